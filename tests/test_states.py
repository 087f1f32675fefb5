"""What run folders keep of a network, out and in again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pack_ptq import observe, plan_bits, prepare, set_ranges
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.runs import RunFolder
from pack_ptq.states import (
    layer_state,
    put_ranges_state,
    put_rest_state,
    put_tuned_state,
    put_unit_state,
    ranges_state,
    rest_state,
    tuned_state,
    unit_state,
)
from pack_ptq.types import BitPlan, QuantizerSpec, Recipe, TuningResult, Unit, UnitResult


def stored(tmp_path: Path, content: Any) -> Any:
    RunFolder.write_tensors(tmp_path / "state.pt", content)
    return torch.load(tmp_path / "state.pt", weights_only=True)


def output(chain: Chain, x: Tensor, weights: Any) -> Tensor:
    switch(chain.layers.values(), weights, activations=True)
    with torch.no_grad():
        return chain.network(x)


def fresh(network: nn.Module, x: Tensor) -> Chain:
    return prepare(network, x).chain


def put_nearest_codes(chain: Chain) -> None:
    for layer in chain.layers.values():
        layer.weight_quantizer.set_codes(
            layer.weight_quantizer.nearest_codes(layer.weight), layer.weight_quantizer.scale
        )


def test_ranges_round_trip(small_chain: Chain, small_network: nn.Module, samples: Tensor, tmp_path: Path) -> None:
    other = fresh(small_network, samples[:4])
    put_ranges_state(other, stored(tmp_path, ranges_state(small_chain)))
    assert torch.equal(output(other, samples, "nearest"), output(small_chain, samples, "nearest"))
    assert all(layer.weight_quantizer.codes is None for layer in other.layers.values())


def test_extra_codes_of_channels_round_trip(tmp_path: Path) -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    x[::20, 3] = 60
    network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    chain, other = fresh(network, x[:4]), fresh(network, x[:4])
    observe(chain, [x])
    recipe = Recipe(split_channels=1.0)
    set_ranges(chain, BitPlan(dict.fromkeys(chain.layers, 4), dict.fromkeys(chain.layers, 4)), recipe)
    assert chain.quantizers["0"].copies is not None
    put_ranges_state(other, stored(tmp_path, ranges_state(chain)))
    assert torch.equal(output(other, x, "nearest"), output(chain, x, "nearest"))


@pytest.mark.parametrize("profile", ["paper", "deploy"])
def test_units_round_trip(small_network: nn.Module, batches: list[Tensor], tmp_path: Path, profile: Any) -> None:
    recipe = Recipe(QuantizerSpec(bits=3), QuantizerSpec(bits=5, per_channel=False), profile=profile)
    chain = fresh(small_network, batches[0])
    observe(chain, batches)
    set_ranges(chain, plan_bits([list(chain.layers)], [(3, 5)], recipe), recipe)
    put_nearest_codes(chain)
    result = UnitResult("a..b", ("a", "b"), 10, 2.0, 1.0, True, 0.5, {"a.fc": 20})
    other = fresh(small_network, batches[0])
    for start in range(len(chain)):
        unit = Unit("pack", chain.names[start : start + 1], start, start + 1)
        state = stored(tmp_path, unit_state(chain, unit, result))
        assert set(state["layers"]) == set(chain.layers_of(start, start + 1))
        assert put_unit_state(other, state) == result
    for path, layer in other.layers.items():
        codes = layer.weight_quantizer.codes
        assert codes is not None
        assert codes.dtype == (torch.int8 if profile == "deploy" else torch.uint8)
        assert torch.equal(codes, chain.layers[path].weight_quantizer.codes)
        assert layer.weight_quantizer.mode == "hard"
        assert layer.integer_bias == (profile == "deploy")
    assert torch.equal(output(other, batches[1], "hard"), output(chain, batches[1], "hard"))


@pytest.mark.parametrize("profile", ["paper", "deploy"])
def test_tuned_network_round_trip(
    small_network: nn.Module, batches: list[Tensor], tmp_path: Path, profile: Any
) -> None:
    recipe = Recipe(QuantizerSpec(bits=3), QuantizerSpec(bits=5, per_channel=False), profile=profile)
    chain = fresh(small_network, batches[0])
    observe(chain, batches)
    set_ranges(chain, plan_bits([list(chain.layers)], [(3, 5)], recipe), recipe)
    put_nearest_codes(chain)
    chain.layers["head"].layer.bias = None
    untuned = unit_state(
        chain, Unit("pack", chain.names, 0, len(chain)), UnitResult("x", ("x",), 1, 1.0, 1.0, True, 0.0)
    )
    untuned, rest = stored(tmp_path, untuned), stored(tmp_path, rest_state(chain))
    for layer in chain.layers.values():
        layer.weight_quantizer.scale = 1.25 * layer.weight_quantizer.scale
        layer.input_quantizer.scale.data *= 0.75
        if layer.bias is not None:
            layer.bias.data += 0.125
    result = TuningResult(10, 2.0, 1.0, True, 0.5)
    other = fresh(small_network, batches[0])
    other.layers["head"].layer.bias = None
    put_rest_state(other.network, rest)
    put_unit_state(other, untuned)
    assert not torch.equal(output(other, batches[1], "hard"), output(chain, batches[1], "hard"))
    assert put_tuned_state(other, stored(tmp_path, tuned_state(chain, result))) == result
    assert torch.equal(output(other, batches[1], "hard"), output(chain, batches[1], "hard"))
    assert not any(parameter.requires_grad for parameter in other.network.parameters())


def test_input_that_is_not_quantized_stays_so(small_chain: Chain, small_network: nn.Module, samples: Tensor) -> None:
    small_chain.layers["stem"].input_quantizer.set_range(None)
    other = fresh(small_network, samples[:4])
    put_ranges_state(other, ranges_state(small_chain))
    assert other.layers["stem"].input_quantizer.bits is None


def test_scales_stay_parameters_that_lightning_finds(
    small_chain: Chain, small_network: nn.Module, samples: Tensor
) -> None:
    other = fresh(small_network, samples[:4])
    put_ranges_state(other, ranges_state(small_chain))
    for layer in other.layers.values():
        assert isinstance(layer.input_quantizer.scale, nn.Parameter)
        assert not layer.input_quantizer.scale.requires_grad
    names = dict(other.network.named_buffers())
    assert "stem.weight_quantizer.scale" in names


def test_rest_is_all_that_codes_do_not_hold(
    small_chain: Chain, small_network: nn.Module, samples: Tensor, tmp_path: Path
) -> None:
    put_nearest_codes(small_chain)
    state = stored(tmp_path, rest_state(small_chain))
    assert set(state) == {f"{path}.layer.bias" for path in small_chain.layers}
    unit = Unit("pack", small_chain.names, 0, len(small_chain))
    whole = unit_state(small_chain, unit, UnitResult("x", ("x",), 1, 1.0, 1.0, True, 0.0))
    untrained = copy.deepcopy(small_network)
    for parameter in untrained.parameters():
        nn.init.normal_(parameter)
    other = fresh(untrained, samples[:4])
    put_rest_state(other.network, state)
    put_unit_state(other, whole)
    assert torch.equal(output(other, samples, "hard"), output(small_chain, samples, "hard"))


def test_rest_holds_norms_that_could_not_be_folded(samples: Tensor) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(self.norm(x).relu()).mean((2, 3)))

    chain = fresh(Early(), samples[:4])
    assert {"norm.weight", "norm.running_mean", "conv.layer.bias", "head.layer.bias"} <= set(rest_state(chain))
    assert not any("quantizer" in key or key.endswith("layer.weight") for key in rest_state(chain))


def test_layer_state_holds_plain_values_and_tensors(small_chain: Chain) -> None:
    state = layer_state(small_chain.layers["head"])
    assert (state["bits"], state["input"]["bits"], state["signed"], state["codes"]) == (8, 8, False, None)
    assert all(isinstance(v, Tensor | int | bool | str | None) for v in (tree_leaves(state)))
