"""Ranges of a whole network from all calibration batches, and the refusal of values that are no numbers."""

import pytest
import torch
from torch import nn

from pack_ptq.calibration import observe, set_ranges
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.prepare import prepare
from pack_ptq.types import BitPlan, QuantizerSpec, Recipe


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


X = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plan_of(chain: Chain, bits: int = 4) -> BitPlan:
    layers = list(chain.layers)
    return BitPlan(dict.fromkeys(layers, bits), {path: None if path == layers[0] else bits for path in layers})


def ranged(batches: list[torch.Tensor], recipe: Recipe) -> Chain:
    chain = prepare(build(), X[:2]).chain
    observe(chain, batches)
    set_ranges(chain, plan_of(chain), recipe)
    return chain


def recipe_with(observer: str = "mse", profile: str = "paper") -> Recipe:
    weight, activation = (QuantizerSpec(4, observer, 99.0, per_channel) for per_channel in (True, False))
    return Recipe(weight, activation, profile=profile)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_ranges_do_not_depend_on_the_batches(observer: str) -> None:
    """Every sample counts, those of a last partial batch too."""
    chains = [ranged(list(batches), recipe_with(observer)) for batches in (X.split(20), X.split(7), X.flip(0).split(1))]
    for path, layer in chains[0].layers.items():
        for chain in chains[1:]:
            other = chain.layers[path].input_quantizer
            assert torch.allclose(layer.input_quantizer.scale, other.scale, rtol=1e-5)
            assert layer.input_quantizer.zero_point == other.zero_point
            assert torch.equal(layer.weight_quantizer.scale, chain.layers[path].weight_quantizer.scale)


def test_observing_leaves_the_outputs_and_stops_watching() -> None:
    chain = prepare(build(), X[:2]).chain
    before = chain.network(X)
    observe(chain, [X])
    assert torch.equal(chain.network(X), before)
    assert all(layer.input_quantizer.watching is None for layer in chain.layers.values())


def test_bits_follow_the_plan() -> None:
    chain = ranged([X], recipe_with())
    first, *rest = chain.layers.values()
    assert first.input_quantizer.bits is None
    assert [layer.input_quantizer.bits for layer in rest] == [4, 4]
    assert [layer.weight_quantizer.limits for layer in chain.layers.values()] == [(0, 15)] * 3
    assert not first.integer_bias


def test_deploy_profile_is_symmetric_with_an_integer_bias() -> None:
    chain = ranged([X], recipe_with(profile="deploy"))
    for layer in chain.layers.values():
        assert layer.integer_bias
        assert layer.weight_quantizer.signed
        assert not layer.weight_quantizer.zero_point.any()
        assert layer.weight_quantizer.scale.numel() == layer.weight.shape[0]
        assert layer.input_quantizer.scale.numel() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_no_numbers_are_refused_by_layer(value: float) -> None:
    chain = prepare(build(), X[:2]).chain
    bad = X.clone()
    bad[11, 1, 2, 3] = value
    with pytest.raises(UserError, match="the input of layer 0 holds NaN or infinity; allowed: finite"):
        observe(chain, bad.split(4))


def test_the_first_layer_with_a_bad_input_is_named() -> None:
    network = build()
    network[3].bias.data[2] = torch.nan
    chain = prepare_without_check(network)
    with pytest.raises(UserError, match="the input of layer 6 holds NaN"):
        observe(chain, [X])


def prepare_without_check(network: nn.Module) -> Chain:
    chain = prepare(build(), X[:2]).chain
    chain.layers["3"].layer.bias.data.copy_(network[3].bias.data)
    return chain


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_layer(value: float) -> None:
    chain = prepare(build(), X[:2]).chain
    observe(chain, [X])
    chain.layers["3"].layer.weight.data[1, 2, 0, 0] = value
    with pytest.raises(UserError, match="the weight of layer 3 holds NaN or infinity; allowed: finite"):
        set_ranges(chain, plan_of(chain), recipe_with())


def test_what_can_be_iterated_once_is_refused() -> None:
    chain = prepare(build(), X[:2]).chain
    with pytest.raises(UserError, match="batches is 'generator'; allowed: what can be iterated twice"):
        observe(chain, (x for x in X.split(5)))


def test_constant_inputs_survive() -> None:
    chain = ranged([torch.zeros(3, 3, 8, 8)], recipe_with())
    for layer in chain.layers.values():
        layer.weight_quantizer.mode, layer.input_quantizer.enabled = "nearest", True
    assert torch.isfinite(chain.network(X)).all()
