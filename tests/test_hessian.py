"""Block scores against a slow plain implementation, and against exact Hessians."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pack_ptq import inner_links, observe, plan_bits, prepare, score_blocks, set_ranges
from pack_ptq.callbacks import HessianScoring
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.hessian import HessianScorer
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.types import BlockScores, QuantizerSpec, Recipe

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def labels_for(x: Tensor) -> Tensor:
    return torch.randint(5, (len(x),), generator=torch.Generator().manual_seed(9))


def task_loss(output: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(output, label, reduction="none")


def quantize_by_hand(layer: QuantizedLayer) -> nn.Module:
    """Give the layer's own module with torch's fake quantization of its weight and input, at the layer's ranges."""
    plain = copy.deepcopy(layer.layer)
    weight, source = layer.weight_quantizer, layer.input_quantizer
    points = weight.zero_point.flatten().to(torch.int32)
    low = torch.fake_quantize_per_channel_affine(
        plain.weight.data.float(), weight.scale.flatten().float(), points, 0, 0, 2**weight.bits - 1
    )
    plain.weight.data = low.to(plain.weight)
    scale, point = source.scale.item(), int(source.zero_point)
    plain.register_forward_pre_hook(
        lambda _, args: torch.fake_quantize_per_tensor_affine(args[0], scale, point, 0, 2**source.bits - 1)
    )
    return plain


@contextmanager
def outputs_of(network: nn.Module, name: str) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _m, _a, output: seen.append(output))
    yield seen
    handle.remove()


def slow_scores(chain: Chain, x: Tensor, label: Tensor, loss: str, variant: str = "paper") -> dict[str, list[float]]:
    """Run the whole network per block, sample by sample; a block is quantized by replacing its layers."""
    plain = copy.deepcopy(chain.network)
    for path, layer in chain.layers.items():
        plain.set_submodule(path, copy.deepcopy(layer.layer))
    result: dict[str, list[float]] = {"scores": [], "loss_increase": [], "squared_error": []}
    for block in BLOCKS:
        changed = copy.deepcopy(plain)
        for path in chain.layers:
            if path.startswith(f"{block}."):
                changed.set_submodule(path, quantize_by_hand(chain.layers[path]))
        increase = numerator = squared = denominator = 0.0
        for one, its_label in zip(x.split(1), label.split(1), strict=True):
            with outputs_of(plain, block) as seen:
                full = plain(one.clone().requires_grad_())
            with outputs_of(changed, block) as seen_changed, torch.no_grad():
                low = changed(one)
            change = (seen_changed[0] - seen[0]).double()
            if loss == "kl":
                p, q = full.double().softmax(1), low.double().softmax(1)
                p, q = (q, p) if variant == "release" else (p, q)
                grown = (p * (p / q).log()).sum().item()
                first_order = 0.0
            else:
                grown = (task_loss(low, its_label) - task_loss(full, its_label)).item()
                slope = torch.autograd.grad(task_loss(full, its_label).sum(), seen[0])[0]
                first_order = (change * slope.double()).sum().item()
            increase += grown / len(x)
            numerator += 2 * (grown - first_order) / len(x)
            squared += change.square().sum().item() / len(x)
            by = change.square().mean() if variant == "release" else change.square().sum()
            denominator += by.item() / len(x)
        result["scores"].append(numerator / denominator)
        result["loss_increase"].append(increase)
        result["squared_error"].append(squared)
    return result


@pytest.mark.parametrize(("loss", "variant"), [("kl", "paper"), ("task", "paper"), ("kl", "release")])
def test_scores_are_those_of_whole_quantized_networks(
    small_chain: Chain, samples: Tensor, loss: str, variant: str
) -> None:
    x, label = samples[:21], labels_for(samples[:21])
    pairs = list(zip(x.split(8), label.split(8), strict=True))
    found = score_blocks(small_chain, pairs, 1, 4, loss, task_loss, variant)
    expected = slow_scores(small_chain, x, label, loss, variant)
    assert found.names == BLOCKS
    assert found.num_samples == 21
    for key, values in expected.items():
        assert getattr(found, key) == pytest.approx(values, rel=2e-3, abs=1e-6), key
    assert min(found.squared_error) > 0


@pytest.mark.parametrize("loss", ["kl", "task"])
def test_scores_do_not_depend_on_the_split(small_chain: Chain, samples: Tensor, loss: str) -> None:
    x, label = samples[:20], labels_for(samples[:20])
    found: list[BlockScores] = []
    for sizes in ([20], [7, 7, 6], [19, 1]):
        pairs = list(zip(x.split(sizes), label.split(sizes), strict=True))
        found.append(score_blocks(small_chain, pairs, 1, 4, loss, task_loss))
    for other in found[1:]:
        assert other.num_samples == 20
        assert other.scores == pytest.approx(found[0].scores, rel=1e-3)


def test_release_multiplies_by_the_size_of_the_output() -> None:
    """Beside that only the KL's roles differ, which hardly matters at 8 bits."""
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    chain = ready(Straight(6, 7, 9, 5), [x], bits=8)
    paper, release = (score_blocks(chain, [x], 0, 3, variant=variant) for variant in ("paper", "release"))
    assert release.squared_error == paper.squared_error
    ratios = [r / p for r, p in zip(release.scores, paper.scores, strict=True)]
    assert ratios == pytest.approx([7, 9, 5], rel=0.02)
    assert release.loss_increase != paper.loss_increase


@pytest.mark.parametrize(
    ("loss", "variant", "words"),
    [
        ("kl", "official", "variant is 'official'; allowed: paper, release"),
        ("task", "release", "loss is 'task'; allowed: kl with"),
    ],
)
def test_unknown_variants_are_refused(small_chain: Chain, loss: str, variant: str, words: str) -> None:
    for make in (
        lambda: HessianScoring(loss, variant=variant),
        lambda: score_blocks(small_chain, [], 1, 4, loss, None, variant),
    ):
        with pytest.raises(UserError, match=f"scoring.init_args.{words}"):
            make()


def test_last_partial_batch_counts(small_chain: Chain, samples: Tensor) -> None:
    whole = score_blocks(small_chain, [samples[:8], samples[8:9]], 1, 4)
    without = score_blocks(small_chain, [samples[:8]], 1, 4)
    last = score_blocks(small_chain, [samples[8:9]], 1, 4)
    mean = [(8 * a + b) / 9 for a, b in zip(without.loss_increase, last.loss_increase, strict=True)]
    assert whole.loss_increase == pytest.approx(mean, rel=1e-4)
    assert whole.num_samples == 9


def test_any_part_of_the_chain_can_be_scored(small_chain: Chain, samples: Tensor) -> None:
    everything = score_blocks(small_chain, [(samples[:8], labels_for(samples[:8]))], 0, 5, "task", task_loss)
    inner = score_blocks(small_chain, [(samples[:8], labels_for(samples[:8]))], 1, 4, "task", task_loss)
    assert everything.names == small_chain.names
    assert everything.scores[1:4] == pytest.approx(inner.scores, rel=1e-4)
    assert all(torch.isfinite(torch.tensor(everything.scores)))


def test_quantizers_are_off_afterwards_and_no_gradient_is_left(small_chain: Chain, samples: Tensor) -> None:
    with torch.no_grad():
        before = small_chain.network(samples)
        score_blocks(small_chain, [(samples[:8], labels_for(samples[:8]))], 1, 4, "task", task_loss)
        assert not torch.is_grad_enabled()
        assert torch.equal(small_chain.network(samples), before)
    assert all(p.grad is None for p in small_chain.network.parameters())
    assert not samples.requires_grad


def test_kl_differentiates_nothing(small_chain: Chain, samples: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", never)
    score_blocks(small_chain, [samples[:4]], 1, 4)


def ready(network: nn.Module, batches: list[Tensor], bits: int = 4) -> Chain:
    """Prepare a network with the same bits in every layer."""
    low = QuantizerSpec(bits=bits), QuantizerSpec(bits=bits, per_channel=False)
    recipe = Recipe(*low, protocol="all", bias_correction="none")
    chain = prepare(network, batches[0]).chain
    observe(chain, batches)
    set_ranges(chain, plan_bits([list(chain.layers)], [(bits, bits)], recipe), recipe)
    return chain


class Straight(nn.Module):
    """Linear layers with ReLU, each a block; the last one is the linear tail behind the block to score."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def half_square(output: Tensor, label: Tensor) -> Tensor:
    return 0.5 * (output - label).square().sum(1)


def test_quadratic_loss_gives_the_exact_hessian() -> None:
    """`L = |W z + b - y|^2 / 2` has the Hessian `W^T W`, so the score is `dz^T W^T W dz / dz^T dz` without error."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 6), torch.randn(30, 3)
    chain = ready(Straight(6, 7, 5, 3).double(), [x.double()])
    x, y = x.double(), y.double()
    found = score_blocks(chain, [(x[:16], y[:16]), (x[16:], y[16:])], 1, 2, "task", half_square)
    plain = [layer.layer for layer in chain.layers.values()]
    middle = list(chain.layers.values())[1]
    for quantizer in (middle.weight_quantizer, middle.input_quantizer):  # torch's own has scales of float32
        quantizer.scale.data = quantizer.scale.data.float()
    source = plain[0](x).relu()
    change = quantize_by_hand(middle)(source).relu() - plain[1](source).relu()
    tail = plain[2].weight
    hessian = torch.autograd.functional.hessian(
        lambda z: half_square(plain[2](z[None]), y[:1]).sum(), torch.randn(5).double()
    )
    assert torch.allclose(hessian, tail.T @ tail)
    expected = ((change @ hessian) * change).sum() / change.square().sum()
    assert found.scores[0] == pytest.approx(expected.item(), rel=1e-5)


@settings(max_examples=10)
@given(st.floats(0.1, 10), st.integers(0, 99))
def test_isotropic_hessian_is_found_whatever_the_change(factor: float, seed: int) -> None:
    """With a tail `c Q`, `Q` orthogonal, the Hessian is `c^2 I`, whose mean is `c^2` in every direction."""
    torch.manual_seed(seed)
    network = Straight(4, 5, 5, 5).double()
    network.layers[-1].weight.data = factor * torch.linalg.qr(torch.randn(5, 5).double())[0]
    x, y = torch.randn(12, 4).double(), torch.randn(12, 5).double()
    chain = ready(network, [x], bits=3)
    found = score_blocks(chain, [(x, y)], 1, 2, "task", half_square)
    assert found.scores[0] == pytest.approx(factor**2, rel=1e-6)


def test_kl_score_is_the_fisher_information_for_small_changes() -> None:
    """`KL = dz^T J^T (diag(p) - p p^T) J dz / 2` up to third order."""
    torch.manual_seed(1)
    x = torch.randn(40, 6)
    chain = ready(Straight(6, 7, 5, 4), [x], bits=8)
    found = score_blocks(chain, list(x.split(16)), 1, 2)
    layers = list(chain.layers.values())
    source = layers[0].layer(x).relu()
    change = (quantize_by_hand(layers[1])(source).relu() - layers[1].layer(source).relu()).double()
    p = chain.network(x).double().softmax(1)
    moved = change @ layers[2].weight.double().T
    curvature = (p * moved**2).sum(1) - (p * moved).sum(1) ** 2
    assert found.scores[0] == pytest.approx((curvature.sum() / change.square().sum()).item(), rel=0.02)


def test_block_that_quantization_does_not_change_scores_zero() -> None:
    network = Straight(4, 4, 4, 4)
    for layer in network.layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    found = score_blocks(ready(network, [torch.randn(8, 4)]), [torch.randn(8, 4)], 1, 2)
    assert (found.scores, found.squared_error) == ((0.0,), (0.0,))


class InPlace(nn.Module):
    """Adds shortcuts and applies ReLU in place, as many trained networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        for first, second in ((0, 1), (2, 3)):
            y = self.convs[second](F.relu(self.convs[first](x), inplace=True))
            y += x
            x = F.relu_(y)
        return self.head(x.mean((2, 3)))


class OutOfPlace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for first, second in ((0, 1), (2, 3)):
            x = F.relu(self.convs[second](F.relu(self.convs[first](x))) + x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("loss", ["kl", "task"])
def test_in_place_sums_are_scored_like_any_other(samples: Tensor, loss: str) -> None:
    found: list[BlockScores] = []
    for kind in (InPlace, OutOfPlace):
        torch.manual_seed(0)
        chain = ready(kind(), [samples])
        start, stop = inner_links(chain)
        found.append(score_blocks(chain, [(samples, labels_for(samples))], start, stop, loss, task_loss))
    assert len(found[0].scores) == 2
    assert found[0].scores == pytest.approx(found[1].scores, rel=1e-4)


def test_task_loss_of_any_form(small_chain: Chain, samples: Tensor) -> None:
    calls: list[tuple[int, ...]] = []

    def watched(output: Tensor, label: Tensor) -> Tensor:
        calls.append(tuple(output.shape))
        return task_loss(output, label)

    scorer = HessianScorer(small_chain, 1, 4, "task", watched)
    loss: Callable[[Tensor, Tensor], Tensor] = scorer.task_loss
    assert loss is watched
    scorer.update(samples[:6], labels_for(samples[:6]))
    assert set(calls) == {(6, 5)}
    assert scorer.compute().num_samples == 6
