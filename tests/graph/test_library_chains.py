"""Chains of the networks of timm and torchvision, with random weights on small images."""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import vgg

from pack_ptq.graph.prepare import Prepared, prepare
from pack_ptq.quant.layers import QUANTIZABLE

NETWORKS = [
    "torchvision/resnet18",
    "timm/resnet18",
    "torchvision/mobilenet_v2",
    "timm/mobilenetv2_050",
    "timm/regnetx_002",
    "torchvision/regnet_x_400mf",
    "torchvision/mnasnet0_5",
    "timm/mnasnet_small",
    "timm/efficientnet_lite0",
    "timm/efficientnet_b0",
    "torchvision/squeezenet1_1",
    "torchvision/vgg11_bn",
    "torchvision/densenet121",
]
NAMES = json.loads((Path(__file__).parent / "block_names.json").read_text())


def build(key: str) -> nn.Module:
    library, name = key.split("/")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "timm":
            network = timm.create_model(name)
        elif name.startswith("vgg"):  # the usual head alone has 120 million weights
            with torch.device("meta"):
                network = torchvision.models.VGG(nn.Identity(), init_weights=False)
            network.features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
            network.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 9))
        else:
            network = torchvision.models.get_model(name, weights=None)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@cache
def prepared(key: str) -> tuple[nn.Module, Prepared]:
    network = build(key)
    return network, prepare(network, images(2))


@pytest.mark.parametrize("key", NETWORKS)
def test_every_called_layer_is_in_exactly_one_link(key: str) -> None:
    network, ready = prepared(key)
    called = set()
    handles = [
        module.register_forward_hook(lambda *_, path=path: called.add(path))
        for path, module in network.named_modules()
        if isinstance(module, QUANTIZABLE)
    ]
    network(images(1))
    for handle in handles:
        handle.remove()
    linked = [path for element in ready.chain.elements for path in element.layers]
    assert len(linked) == len(set(linked))
    assert set(linked) == set(ready.chain.layers) == called
    assert not ready.left_out


@pytest.mark.parametrize("key", NETWORKS)
@torch.no_grad()
def test_link_by_link_is_the_untouched_network(key: str) -> None:
    """At a batch size other than the traced ones, from every boundary to the next and from there to the output."""
    network, ready = prepared(key)
    chain, x = ready.chain, images(5)
    expected = network(x)
    tolerance = {"rtol": 1e-3, "atol": 1e-4 * expected.abs().max().item()}
    assert torch.allclose(chain.network(x), expected, **tolerance)
    whole = chain.run(x)
    boundaries = chain.run_collecting(x, 0, len(chain), range(1, len(chain)))
    value = x
    for index in range(len(chain)):
        value = chain.run(value, index, index + 1)
        assert torch.equal(value, boundaries[index + 1])
    assert torch.equal(value, whole)
    assert torch.allclose(value, expected, **tolerance)


@pytest.mark.parametrize("key", ["torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/densenet121"])
@torch.no_grad()
def test_every_range_of_links(key: str) -> None:
    chain, x = prepared(key)[1].chain, images(1)
    boundaries = {0: x} | chain.run_collecting(x, 0, len(chain), range(len(chain)))
    count = len(chain)
    ranges = [(i, j) for i in range(count + 1) for j in range(i, count + 1)]
    for start, stop in ranges if count <= 10 else ranges[::5]:
        assert torch.equal(chain.run(boundaries[start], start, stop), boundaries[stop])


@pytest.mark.parametrize("key", NAMES)
def test_names_of_the_blocks(key: str) -> None:
    assert list(prepared(key)[1].chain.names) == NAMES[key]


@pytest.mark.parametrize("key", NETWORKS)
def test_all_foldable_norms_are_gone(key: str) -> None:
    ready = prepared(key)[1]
    rest = [path for path, m in ready.chain.network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # A norm that reads a concatenation has no layer before it.
    assert all("densenet" in key and ("norm1" in path or "transition" in path or "norm5" in path) for path in rest)


def test_the_users_network_is_left_untouched() -> None:
    network = build("torchvision/resnet18").train()
    network.layer1[0].conv1.weight.grad = torch.ones_like(network.layer1[0].conv1.weight)
    twin = copy.deepcopy(network)
    modules = dict(network.named_modules())
    parameters = {name: (id(p), p._version) for name, p in network.named_parameters()}
    prepare(network, images(2))
    assert dict(network.named_modules()) == modules
    assert {name: (id(p), p._version) for name, p in network.named_parameters()} == parameters
    assert all(p.requires_grad for p in network.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), twin.state_dict().values(), strict=True)
    )
    assert all(a.training and getattr(a, "inplace", None) == getattr(b, "inplace", None)
               for a, b in zip(network.modules(), twin.modules(), strict=True))  # fmt: skip
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert network.layer1[0].conv1.weight.grad is not None
