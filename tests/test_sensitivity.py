"""Sensitivities against whole networks that are quantized by hand, and what measuring must leave alone."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from pack_ptq import QuantizerSpec, Recipe, UserError, measure_sensitivity, observe, prepare, set_ranges, tile_units
from pack_ptq.bits import plan_bits, protocol_bits
from pack_ptq.graph.chain import Chain
from pack_ptq.packing import inner_links
from pack_ptq.quant.affine import code_limits, fake_quantize
from pack_ptq.quant.quantizers import WeightQuantizer
from pack_ptq.sensitivity import SensitivityMeter, layer_sizes
from pack_ptq.states import ranges_state
from pack_ptq.types import Unit


def by_hand(chain: Chain, paths: list[str], kind: str, width: int, recipe: Recipe, x: Tensor) -> float:
    """Run a copy of the whole network, sample by sample, with some weights or some inputs quantized."""
    set_ranges(chain, plan_bits([list(chain.layers)], [(width, width)], Recipe(protocol="all")), recipe)
    plain = copy.deepcopy(chain.network)
    for path, layer in chain.layers.items():
        module = copy.deepcopy(layer.layer)
        quantizer: Any = layer.weight_quantizer if kind == "weight" else layer.input_quantizer
        scale, point = quantizer.scale.data, quantizer.zero_point
        limits = code_limits(width, signed=isinstance(quantizer, WeightQuantizer) and quantizer.signed)
        if path in paths and kind == "weight":
            module.weight.data = fake_quantize(module.weight.data, scale, point, limits)
        elif path in paths:
            module.register_forward_pre_hook(
                lambda _, args, s=scale, z=point, li=limits: (fake_quantize(args[0], s, z, li),)
            )
        plain.set_submodule(path, module)
    total = 0.0
    with torch.no_grad():
        for one in x.split(1):
            p, q = chain.network(one).double().softmax(1), plain(one).double().softmax(1)
            total += (p * (p / q).log()).sum().item()
    return total / len(x)


@pytest.mark.parametrize("profile", ["paper", "deploy"])
def test_kl_is_that_of_whole_networks(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe, profile: Any
) -> None:
    recipe = Recipe(small_recipe.weight, small_recipe.activation, profile=profile, bias_correction="none")
    set_ranges(small_chain, plan_bits([list(small_chain.layers)], [(3, 3)], recipe), recipe)
    x = samples[:21]
    found = measure_sensitivity(small_chain, list(x.split(8)), small_units, recipe, [2, 5], [3])
    packs = [unit for unit in small_units if unit.kind == "pack"]
    assert [pack.name for pack in found] == [unit.name for unit in packs] == ["blocks.0..blocks.1", "blocks.2"]
    for unit, pack in zip(packs, found, strict=True):
        paths = list(small_chain.layers_of(unit.start, unit.stop))
        assert list(pack.weight) == [2, 5]
        assert list(pack.activation) == [3]
        for kind, values in (("weight", pack.weight), ("activation", pack.activation)):
            for width, kl in values.items():
                expected = by_hand(small_chain, paths, kind, width, recipe, x)
                assert kl == pytest.approx(expected, rel=1e-3, abs=1e-7), (pack.name, kind, width)
                assert kl > 0


def test_candidates_of_the_paper_by_default(small_chain: Chain, small_units: list[Unit], samples: Tensor) -> None:
    recipe = Recipe(QuantizerSpec(bits=4), QuantizerSpec(bits=6, per_channel=False), bias_correction="none")
    for pack in measure_sensitivity(small_chain, [samples], small_units, recipe):
        assert list(pack.weight) == [3, 4, 6]
        assert list(pack.activation) == [4, 6, 8]
        assert pack.weight[3] > pack.weight[6]
        assert pack.activation[4] > pack.activation[8]


def test_means_do_not_depend_on_the_split(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe
) -> None:
    whole, parts = (
        measure_sensitivity(small_chain, batches, small_units, small_recipe)
        for batches in ([samples[:25]], [(part, None) for part in samples[:25].split(8)])
    )
    for a, b in zip(whole, parts, strict=True):
        assert a.weight == pytest.approx(b.weight, rel=1e-3)
        assert a.activation == pytest.approx(b.activation, rel=1e-3)


def test_nothing_is_left_behind(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe
) -> None:
    before = copy.deepcopy(ranges_state(small_chain))
    with torch.no_grad():
        output = small_chain.network(samples)
    measure_sensitivity(small_chain, [samples], small_units, small_recipe, [2, 3, 8], [2, 8])
    after, structure = tree_flatten(ranges_state(small_chain))
    assert structure == tree_flatten(before)[1]
    for value, earlier in zip(after, tree_leaves(before), strict=True):
        assert torch.equal(value, earlier) if isinstance(value, Tensor) else value == earlier
    with torch.no_grad():
        assert torch.equal(small_chain.network(samples), output), "all quantizers are off"


def test_ranges_are_searched_once_per_width(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe, monkeypatch: Any
) -> None:
    searched = []
    real = WeightQuantizer.set_range
    monkeypatch.setattr(
        WeightQuantizer,
        "set_range",
        lambda self, weight, spec, sym: (searched.append(spec.bits), real(self, weight, spec, sym)),
    )
    measure_sensitivity(small_chain, list(samples.split(8)), small_units, small_recipe)
    assert sorted(searched) == sorted([2, 3, 4] * 6)


def test_a_candidate_runs_its_pack_and_what_follows(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe, monkeypatch: Any
) -> None:
    runs = []
    real = Chain.run
    monkeypatch.setattr(
        Chain, "run", lambda self, x, start=0, stop=None: (runs.append(start), real(self, x, start, stop))[1]
    )
    SensitivityMeter(small_chain, small_units, small_recipe, [2, 3], [4]).update(samples[:4])
    assert runs == [1, 1, 1, 3, 3, 3]


def test_a_layer_is_measured_alone_from_its_own_link(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe
) -> None:
    found = measure_sensitivity(small_chain, [samples[:8]], small_units, small_recipe, [2, 5], [3], "layer")
    assert [each.name for each in found] == [f"blocks.{block}.conv{conv}" for block in range(3) for conv in (1, 2)]
    for each in found:
        for kind, values in (("weight", each.weight), ("activation", each.activation)):
            for width, kl in values.items():
                expected = by_hand(small_chain, [each.name], kind, width, small_recipe, samples[:8])
                assert kl == pytest.approx(expected, rel=1e-3, abs=1e-7), (each.name, kind, width)


class TwoLayers(nn.Module):
    """Its only pack holds the first and the last layer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block[:-1]:
            x = layer(x).relu()
        return self.block[-1](x)


def whole_pack(network: nn.Module, x: Tensor, recipe: Recipe) -> tuple[Chain, list[Unit]]:
    chain = prepare(network, x, ["."]).chain
    observe(chain, [x])
    set_ranges(chain, plan_bits([list(chain.layers)], [(3, 3)], recipe), recipe)
    return chain, tile_units(chain, [(0, inner_links(chain)[1] - inner_links(chain)[0])])


@pytest.mark.parametrize(
    ("protocol", "weights", "inputs"),
    [("first_last_8", ["block.1"], ["block.1"]), ("all", ["block.0", "block.1", "block.2"], ["block.1", "block.2"]),
     ("boundary_high", ["block.1"], ["block.1"])],
)  # fmt: skip
def test_layers_of_the_protocol_are_no_part(protocol: Any, weights: list[str], inputs: list[str]) -> None:
    torch.manual_seed(0)
    low = QuantizerSpec(3), QuantizerSpec(3, per_channel=False)
    x, recipe = torch.randn(40, 6), Recipe(*low, protocol, bias_correction="none")
    chain, units = whole_pack(TwoLayers(6, 9, 9, 4), x, recipe)
    assert [unit.kind for unit in units] == ["pack"]
    (pack,) = measure_sensitivity(chain, [x], units, recipe, [2], [2])
    assert pack.weight[2] == pytest.approx(by_hand(chain, weights, "weight", 2, recipe, x), rel=1e-3)
    assert pack.activation[2] == pytest.approx(by_hand(chain, inputs, "activation", 2, recipe, x), rel=1e-3)


def test_pack_without_free_layers() -> None:
    torch.manual_seed(0)
    low = QuantizerSpec(3), QuantizerSpec(4, per_channel=False)
    x, recipe = torch.randn(40, 6), Recipe(*low, bias_correction="none")
    chain, units = whole_pack(TwoLayers(6, 9, 4), x, recipe)
    (pack,) = measure_sensitivity(chain, [x], units, recipe)
    assert (pack.weight, pack.activation) == ({3: 0.0}, {4: 0.0})
    assert set(protocol_bits("block.0", "block.1", recipe).weight) == set(chain.layers)


def test_no_numbers_are_refused_by_the_packs_name(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe
) -> None:
    meter = SensitivityMeter(small_chain, small_units, small_recipe)
    meter.update(samples[:4])
    meter.sums[7] = torch.nan
    with pytest.raises(UserError, match=r"KL divergence with 3 weight bits in blocks\.2 is nan; allowed: finite"):
        meter.compute()


def test_sizes_by_hand(small_chain: Chain) -> None:
    sizes = layer_sizes(small_chain)
    assert (sizes["stem"].weights, sizes["stem"].inputs, sizes["stem"].macs) == (216, 108, 36 * 216)
    assert (sizes["head"].weights, sizes["head"].inputs, sizes["head"].macs) == (40, 8, 40)
