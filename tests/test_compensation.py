"""Compensated layers: what the search makes of planted problems, and what units keep of it."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_helpers import plan_for
from torch import Tensor, nn

from pack_ptq import Hardware, Workplace, observe, prepare, reconstruct, set_ranges, tile_units
from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.compensation import compensate
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.output_error import output_error
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.snapshot import Snapshot
from pack_ptq.types import LowRankSpec, QuantizerSpec, Recipe, ReconstructionSpec, UnitResult

PLACE = Workplace(hardware=Hardware("cpu"))
WEIGHT = QuantizerSpec(bits=4)
SIZE = 16


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted() -> tuple[Part, PackData]:
    """Give a layer whose quantized input lacks three directions in part, which a correction of rank 3 mends."""
    linear = nn.Linear(SIZE, SIZE).requires_grad_(False)
    linear.weight.copy_(random(SIZE, SIZE, seed=1) / 4)
    linear.bias.zero_()
    full = random(128, SIZE, seed=2)
    directions = torch.linalg.qr(random(SIZE, 3, seed=3)).Q
    low = full - 0.6 * full @ directions @ directions.T
    layer = QuantizedLayer(linear, ActivationQuantizer())
    layer.weight_quantizer.set_range(layer.weight, WEIGHT, symmetric=False)
    layer.input_quantizer.scale.fill_(8 / 255)
    layer.input_quantizer.zero_point.fill_(128)
    budget = MemoryBudget(2**24)
    storages = [fill(budget, 128, [rows], lambda x: x) for rows in (full, low, linear(full))]
    return Part("00 a", {"a": layer}, {}, layer), PackData(*storages)


def compensated(
    ranks: tuple[int, ...], weights: Any = "off", **settings: Any
) -> tuple[QuantizedLayer, dict[str, int], float, float]:
    """Give the layer, its rank, and the error without and with the compensation."""
    part, data = planted()
    layer = part.layers["a"]
    low_rank = LowRankSpec(ranks, search_steps=160, fit_steps=80, learning_rate=2e-2, alpha_lr=3e-2, **settings)
    with quantized([layer], weights):
        before = output_error(layer, data)
    chosen = compensate(part, data, ReconstructionSpec(low_rank=low_rank), WEIGHT, PLACE)
    with quantized([layer], weights):
        layer.trial = layer.compensated_weight if weights == "off" else None
        after = output_error(layer, data)
    layer.trial = None
    return layer, chosen, before, after


def test_search_prefers_a_rank_that_suffices() -> None:
    layer, ranks, before, after = compensated((1, 2, 6, 10))
    assert ranks["a"] in (6, 10)
    assert after < 0.03 * before
    assert torch.linalg.matrix_rank(layer.compensation, rtol=1e-4) == ranks["a"]
    _, ranks, _, fixed = compensated((1,))
    assert ranks == {"a": 1}
    assert fixed > 5 * after, "two of three directions are left"


def test_joint_order_mends_too_and_leaves_the_weight() -> None:
    layer, _, before, after = compensated((6,), "nearest", order="joint")
    assert after < 0.5 * before
    assert torch.equal(layer.weight, random(SIZE, SIZE, seed=1) / 4)


def test_ranges_are_those_of_the_compensated_weight() -> None:
    part, data = planted()
    layer = part.layers["a"]
    layer.weight_quantizer.set_range(layer.weight, QuantizerSpec(bits=5), symmetric=True)
    before = Snapshot.of(part)
    first = layer.weight_quantizer.scale.clone()
    low_rank = LowRankSpec((4,), search_steps=10, fit_steps=0, learning_rate=0.1)
    compensate(part, data, ReconstructionSpec(low_rank=low_rank), WEIGHT, PLACE)
    wanted = copy.deepcopy(layer.weight_quantizer)
    wanted.set_range(layer.weight + layer.compensation, QuantizerSpec(bits=5), symmetric=True)
    assert torch.equal(layer.weight_quantizer.scale, wanted.scale)
    assert (layer.weight_quantizer.bits, layer.weight_quantizer.signed) == (5, True)
    assert not torch.equal(wanted.scale, first)
    layer.compensation = None
    before.put_back(part)
    assert torch.equal(layer.weight_quantizer.scale, first)
    assert torch.equal(layer.weight_quantizer.codes.float(), layer.weight_quantizer.nearest_codes(layer.weight))


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


LOW_RANK = LowRankSpec((2, 4, 100), search_steps=16, fit_steps=10, learning_rate=1e-2)


@pytest.fixture
def rows() -> list[Tensor]:
    return list((random(64, 12, seed=6) @ random(12, 12, seed=7)).split(24))


@pytest.fixture
def recipe() -> Recipe:
    fit = ReconstructionSpec(steps=20, batch_size=16, rounding_lr=1e-2, weight_scale_lr=0.0, low_rank=LOW_RANK)
    return Recipe(QuantizerSpec(bits=3), QuantizerSpec(bits=3, per_channel=False), reconstruction=fit)


@pytest.fixture
def mlp_chain(rows: list[Tensor], recipe: Recipe) -> Chain:
    """Give two blocks between a stem of 12 inputs and a head of 5 outputs, their ranges set."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(12, 16), Block(16), Block(16), nn.Linear(16, 5)).eval()
    chain = prepare(network, rows[0]).chain
    observe(chain, rows)
    set_ranges(chain, plan_for(chain, recipe), recipe)
    return chain


def run(chain: Chain, rows: list[Tensor], recipe: Recipe, seed: int = 1) -> tuple[Chain, list[UnitResult]]:
    chain = copy.deepcopy(chain)
    return chain, reconstruct(chain, tile_units(chain, [(0, 2)]), rows, recipe, replace(PLACE, seed=seed))


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, reconstruction=replace(recipe.reconstruction, **settings))


def test_units_keep_codes_of_the_compensated_weights(
    mlp_chain: Chain, rows: list[Tensor], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: dict[int, Tensor] = {}
    set_codes = type(next(iter(mlp_chain.layers.values())).weight_quantizer).set_codes
    layers: list[QuantizedLayer] = []

    def watched(quantizer: Any, codes: Tensor, scale: Tensor) -> None:
        layer = next(each for each in layers if each.weight_quantizer is quantizer)
        merged[id(layer)] = layer.compensated_weight.clone()
        set_codes(quantizer, codes, scale)

    chain = copy.deepcopy(mlp_chain)
    layers += chain.layers.values()
    monkeypatch.setattr(type(layers[0].weight_quantizer), "set_codes", watched)
    results = reconstruct(chain, tile_units(chain, [(0, 2)]), rows, recipe, replace(PLACE, seed=1))
    assert results[1].accepted
    assert set(results[1].ranks) == {"1.up", "1.down", "2.up", "2.down"}
    assert set(results[1].ranks.values()) <= {2, 4}
    assert results[1].steps == 20 + 16 + 10
    assert results[1].final_loss < results[1].nearest_loss
    for path, layer in chain.layers.items():
        quantizer = layer.weight_quantizer
        assert torch.equal(layer.weight, mlp_chain.layers[path].weight), "in full precision it is the same network"
        assert (layer.compensation, layer.trial, quantizer.mode) == (None, None, "hard")
        low, high = quantizer.limits
        assert low <= quantizer.codes.min() <= quantizer.codes.max() <= high
        exact = merged[id(layer)] / quantizer.scale + quantizer.zero_point
        inside = (exact >= low) & (exact <= high)
        assert ((quantizer.codes - exact).abs()[inside] <= 1 + 1e-4).all()
    moved = [not torch.equal(merged[id(chain.layers[path])], chain.layers[path].weight) for path in results[1].ranks]
    assert all(moved)


def test_seeds_decide_everything(mlp_chain: Chain, rows: list[Tensor], recipe: Recipe) -> None:
    torch.manual_seed(0)
    first, results = run(mlp_chain, rows, recipe)
    torch.manual_seed(1)
    again, repeated = run(mlp_chain, rows, recipe)
    other, _ = run(mlp_chain, rows, recipe, seed=2)
    assert [replace(r, seconds=0) for r in results] == [replace(r, seconds=0) for r in repeated]

    def codes(chain: Chain) -> list[Tensor]:
        return [t for each in chain.layers.values() for t in (each.weight_quantizer.codes, each.weight_quantizer.scale)]

    assert all(torch.equal(a, b) for a, b in zip(codes(first), codes(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(codes(first), codes(other), strict=True))


def test_layers_are_compensated_alone(mlp_chain: Chain, rows: list[Tensor], recipe: Recipe) -> None:
    _, results = run(mlp_chain, rows, changed(recipe, granularity="layer"))
    assert results[1].steps == 4 * (20 + 16 + 10)
    assert set(results[1].ranks) <= {"1.up", "1.down", "2.up", "2.down"}
    assert results[1].ranks


def test_compensation_that_does_harm_is_undone(mlp_chain: Chain, rows: list[Tensor], recipe: Recipe) -> None:
    harmful = replace(LOW_RANK, learning_rate=100.0, fit_steps=0)
    chain, results = run(mlp_chain, rows, changed(recipe, low_rank=harmful))
    for result in results:
        assert (result.accepted, result.ranks, result.final_loss) == (False, {}, result.nearest_loss)
    for path, layer in chain.layers.items():
        before, quantizer = mlp_chain.layers[path], layer.weight_quantizer
        assert torch.equal(quantizer.scale, before.weight_quantizer.scale)
        assert torch.equal(quantizer.codes.float(), before.weight_quantizer.nearest_codes(before.weight))
        assert torch.equal(layer.input_quantizer.scale, before.input_quantizer.scale)


def test_compensation_without_a_fit_of_the_rounding(mlp_chain: Chain, rows: list[Tensor], recipe: Recipe) -> None:
    _, results = run(mlp_chain, rows, changed(recipe, steps=0))
    assert results[1].accepted
    assert results[1].steps == 26


def test_units_without_linear_layers_are_fitted_as_ever(
    small_chain: Chain, batches: list[Tensor], small_recipe: Recipe
) -> None:
    plain = changed(small_recipe, steps=4)
    units = tile_units(small_chain, [(0, 1)])[:2]
    outcomes = []
    for settings in (plain, changed(plain, low_rank=LOW_RANK)):
        chain = copy.deepcopy(small_chain)
        outcomes.append(reconstruct(chain, units, batches, settings, replace(PLACE, seed=1)))
    assert [replace(r, seconds=0) for r in outcomes[0]] == [replace(r, seconds=0) for r in outcomes[1]]
