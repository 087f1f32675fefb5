"""Folding BatchNorm: the oracle is the unfolded network."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from pack_ptq.graph.fold import fold_batch_norms
from pack_ptq.graph.trace import trace_network


def settle(network: nn.Module) -> nn.Module:
    """Give every norm statistics, gains and shifts that matter."""
    for module in network.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3)
            if getattr(module, "weight", None) is not None:
                module.weight.data.normal_()  # of both signs, as trained ones
                module.bias.data.normal_()
    return network.eval()


@torch.no_grad()
def fold(network: nn.Module, *shape: int) -> tuple[list[str], nn.Module, float]:
    """Fold a copy; give the folded paths, the copy, and how far its output is from the unfolded network's."""
    torch.manual_seed(0)
    network, x = settle(network), torch.randn(4, *shape)
    folded = copy.deepcopy(network)
    paths = fold_batch_norms(folded, trace_network(folded, x))
    expected = network(x)
    return paths, folded, ((folded(x) - expected).abs().max() / expected.abs().max()).item()


FOLDABLE: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv1d": (lambda: [nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)], (3, 9)),
    "conv2d": (lambda: [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)], (3, 6, 6)),
    "conv2d-no-bias": (lambda: [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)], (3, 6, 6)),
    "conv3d": (lambda: [nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6)], (3, 4, 4, 4)),
    "depthwise": (lambda: [nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)], (6, 6, 6)),
    "grouped": (lambda: [nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)], (6, 6, 6)),
    "transposed1d": (lambda: [nn.ConvTranspose1d(3, 6, 3), nn.BatchNorm1d(6)], (3, 5)),
    "transposed2d": (lambda: [nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)], (3, 5, 5)),
    "transposed-grouped": (lambda: [nn.ConvTranspose2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)], (6, 5, 5)),
    "transposed3d-grouped": (lambda: [nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6)], (4, 3, 3, 3)),
    "linear": (lambda: [nn.Linear(7, 5), nn.BatchNorm1d(5)], (7,)),
    "linear-no-bias": (lambda: [nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5)], (7,)),
    "not-affine": (lambda: [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)], (3, 6, 6)),
    "large-eps": (lambda: [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1)], (3, 6, 6)),
    "frozen": (lambda: [nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6)], (3, 6, 6)),
    "frozen-fused": (lambda: [nn.Conv2d(3, 6, 3), FrozenBatchNormAct2d(6)], (3, 6, 6)),
    "fused": (lambda: [nn.Conv2d(3, 6, 3), BatchNormAct2d(6)], (3, 6, 6)),
    "fused-silu-drop": (
        lambda: [nn.Conv2d(3, 6, 3), BatchNormAct2d(6, act_layer=nn.SiLU, drop_layer=nn.Dropout)],
        (3, 6, 6),
    ),
    "fused-no-act": (lambda: [nn.Conv2d(3, 6, 3), BatchNormAct2d(6, apply_act=False)], (3, 6, 6)),
}


@pytest.mark.parametrize("kind", FOLDABLE)
def test_folded_network_computes_the_same(kind: str) -> None:
    build, shape = FOLDABLE[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        paths, folded, error = fold(nn.Sequential(*build(), nn.Tanh()), *shape)
    assert paths == ["1"]
    assert not any(hasattr(m, "running_var") for m in folded.modules())
    assert error < 1e-5


def test_a_wrong_fold_would_be_seen() -> None:
    network = settle(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    x = torch.randn(2, 3, 6, 6)
    assert (network(x) - network[0](x)).abs().max() > 0.1


class ReadTwice(nn.Module):
    def __init__(self, through_shape: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.through_shape = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), through_shape

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + (y.shape[1] + y.dim() if self.through_shape else y)


class NormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.norm(self.conv1(x))))


class ConvTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.conv(x)))


class LinearTokens(nn.Module):
    """BatchNorm1d on (N, L, C) normalises L."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class ActBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x)))


class NormAndRelu(nn.BatchNorm2d):
    """A user's subclass, whose ReLU must not vanish."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (ReadTwice(), (3, 6, 6)),
        (NormTwice(), (3, 6, 6)),
        (ConvTwice(), (3, 6, 6)),
        (LinearTokens(), (5, 5)),
        (ActBetween(), (3, 6, 6)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), NormAndRelu(6)), (3, 6, 6)),
    ],
    ids=[
        "read-twice",
        "norm-twice",
        "conv-twice",
        "tokens",
        "act-between",
        "before",
        "untracked",
        "instance",
        "subclass",
    ],
)
def test_what_must_not_fold_stays(network: nn.Module, shape: tuple[int, ...]) -> None:
    paths, folded, error = fold(network, *shape)
    assert paths == []
    assert error == 0
    assert [type(m) for m in folded.modules()] == [type(m) for m in network.modules()]


def test_asking_for_the_shape_is_no_reader() -> None:
    paths, _, error = fold(ReadTwice(through_shape=True), 3, 6, 6)
    assert paths == ["norm"]
    assert error < 1e-5


def test_a_shared_weight_is_not_changed_under_the_other_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    network[2].weight = network[0].weight
    paths, folded, error = fold(network, 3, 4, 4)
    assert paths == ["1"]
    assert error < 1e-5
    assert not torch.equal(folded[0].weight, folded[2].weight)


def test_half_precision_stays_half() -> None:
    network = settle(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))).bfloat16()
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    expected = network(x)
    fold_batch_norms(network, trace_network(network, x))
    assert network[0].weight.dtype == network[0].bias.dtype == torch.bfloat16
    assert torch.allclose(network(x), expected, atol=0.1)


def test_frozen_norm_without_eps() -> None:
    """DETR's keeps its 1e-5 in the forward."""

    class FrozenBatchNormOfDETR(FrozenBatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            del self.eps

        def forward(self, x: Tensor) -> Tensor:
            gain = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
            return (x - self.running_mean.reshape(1, -1, 1, 1)) * gain + self.bias.reshape(1, -1, 1, 1)

    paths, _, error = fold(nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNormOfDETR(6)), 3, 6, 6)
    assert paths == ["1"]
    assert error < 1e-5


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnetv2_50", "legacy_seresnet18", "hrnet_w18_small"])
def test_whole_networks_of_timm(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=4)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    network.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
        assert fold_batch_norms(network, trace_network(network, x))
        assert (network(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


class Rectified(nn.Conv2d):
    """A convolution that does more after its product, so that a gain cannot go into the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Centred(nn.Conv2d):
    """A convolution with another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "convolution",
    [
        parametrizations.weight_norm(nn.Conv2d(3, 6, 1)),
        parametrizations.spectral_norm(nn.Conv2d(3, 6, 1)),
        Rectified(3, 6, 1),
        Centred(3, 6, 1),
    ],
    ids=["weight norm", "spectral norm", "rectified", "centred"],
)
def test_what_is_more_than_a_product_keeps_its_norm(convolution: nn.Module) -> None:
    network = settle(nn.Sequential(convolution, nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).eval())
    paths, _, error = fold(network, 3, 4, 4)
    assert paths == ["3"]
    assert error < 1e-5
