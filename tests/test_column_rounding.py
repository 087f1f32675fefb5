"""Roundings that begin where GPTQ leaves them: what layers read, what parts keep, and fits from there."""

import copy
from dataclasses import replace

import pytest
import torch
from plan_helpers import plan_for
from torch import Tensor, nn

from pack_ptq import Hardware, Recipe, UserError, Workplace, observe, prepare, reconstruct, set_ranges
from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.column_rounding import start_by_columns
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part, unit_part
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.gptq import gptq_start
from pack_ptq.types import LowRankSpec, QuantizerSpec, ReconstructionSpec, TuningSpec, Unit, UnitResult

PLACE = Workplace(hardware=Hardware("cpu"))


@pytest.fixture
def by_columns(small_recipe: Recipe) -> Recipe:
    return with_fit(small_recipe, start="gptq")


def with_fit(recipe: Recipe, **settings: object) -> Recipe:
    return replace(recipe, reconstruction=replace(recipe.reconstruction, **settings))  # type: ignore[arg-type]


def part_of(chain: Chain, samples: Tensor) -> tuple[Part, PackData]:
    """Give the whole network as one part."""
    budget, unit = MemoryBudget(2**30), Unit("all", chain.names, 0, len(chain))
    low = fill(budget, len(samples), [samples], lambda x: x)
    return unit_part(chain, unit, "all"), PackData(low, low, fill(budget, len(samples), [samples], chain.network))


def run(chain: Chain, units: list[Unit], batches: list[Tensor], recipe: Recipe) -> tuple[Chain, list[UnitResult]]:
    chain = copy.deepcopy(chain)
    return chain, reconstruct(chain, units, batches, recipe, PLACE)


@torch.no_grad()
def test_a_layer_starts_by_what_it_reads_behind_the_starts_before_it(small_chain: Chain, samples: Tensor) -> None:
    part, data = part_of(small_chain, samples)
    start_by_columns(part, data)
    head = small_chain.layers["head"]
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with quantized(part.operations, "nearest"):
        small_chain.network(samples)
        read = head.input_quantizer(seen[0])
    handle.remove()
    gram = (read.double().mT @ read.double() / len(read))[None]
    quantizer = head.weight_quantizer
    codes = (head.weight / quantizer.scale + quantizer.zero_point)[None]
    start = gptq_start(codes, gram, quantizer.limits)
    assert start is not None
    assert torch.equal(quantizer.nearest_codes(head.rounded_weight), start[0].round())
    assert not torch.equal(quantizer.nearest_codes(head.rounded_weight), quantizer.nearest_codes(head.weight))


@torch.no_grad()
@pytest.mark.parametrize("corrected", [False, True])
def test_only_what_a_bias_does_not_take_up_is_made_up_for(small_recipe: Recipe, corrected: bool) -> None:
    """Where all samples are alike, what the rounding of one weight adds is for the bias or for the other weights."""
    recipe = replace(small_recipe, protocol="all", bias_correction="input_mean" if corrected else "none")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 5))
        alike = torch.rand(1, 12).repeat(8, 1)
    chain = prepare(network.eval(), alike).chain
    observe(chain, [alike])
    set_ranges(chain, plan_for(chain, recipe), recipe)
    start_by_columns(*part_of(chain, alike))
    for layer in chain.layers.values():
        nearest = layer.weight_quantizer.nearest_codes
        assert torch.equal(nearest(layer.rounded_weight), nearest(layer.weight)) == corrected


def test_without_steps_codes_are_those_of_the_start(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], by_columns: Recipe
) -> None:
    chain, results = run(small_chain, small_units, batches, with_fit(by_columns, steps=0))
    for unit, result in zip(small_units, results, strict=True):
        assert result.accepted == (result.final_loss < result.nearest_loss)
        assert result.steps == 0
        for path, layer in chain.layers_of(unit.start, unit.stop).items():
            nearest = small_chain.layers[path].weight_quantizer.nearest_codes(layer.weight).byte()
            assert torch.equal(layer.weight_quantizer.codes, nearest) != result.accepted
            assert layer.start is None
    assert [result.accepted for result in results[1:3]] == [True, True]
    assert results[1].final_loss < 0.9 * results[1].nearest_loss


def test_short_fits_end_lower_from_there(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe, by_columns: Recipe
) -> None:
    _, plain = run(small_chain, small_units[:2], batches, with_fit(small_recipe, steps=10))
    chain, started = run(small_chain, small_units[:2], batches, with_fit(by_columns, steps=10))
    assert started[1].nearest_loss == pytest.approx(plain[1].nearest_loss, rel=0.2)
    assert started[1].final_loss < plain[1].final_loss
    for layer in chain.layers.values():
        assert layer.start is None


def test_codes_may_lie_further_off_than_one(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], by_columns: Recipe
) -> None:
    """Which roundings from the weights cannot reach."""
    chain, _ = run(small_chain, small_units[:2], batches, with_fit(by_columns, steps=0, weight_scale_lr=0.0))
    off = []
    for path, layer in chain.layers_of(1, 3).items():
        quantizer = small_chain.layers[path].weight_quantizer
        off.append((layer.weight_quantizer.codes - layer.weight / quantizer.scale - quantizer.zero_point).abs().max())
    assert max(off) > 1


def test_low_rank_compensation_comes_first(samples: Tensor) -> None:
    x = samples.flatten(1)[:, :12].contiguous()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    low_rank = LowRankSpec((2,), search_steps=4, fit_steps=4)
    fit = ReconstructionSpec(steps=0, batch_size=16, low_rank=low_rank, start="gptq")
    recipe = Recipe(
        QuantizerSpec(3), QuantizerSpec(3, per_channel=False), reconstruction=fit, tuning=TuningSpec(steps=0)
    )
    chain = prepare(network.eval(), x).chain
    observe(chain, [x])
    set_ranges(chain, plan_for(chain, recipe), recipe)
    _, results = run(chain, [Unit("all", chain.names, 0, len(chain))], [x], recipe)
    assert results[0].accepted
    assert set(results[0].ranks.values()) == {2}
    assert results[0].steps == 8


def test_transposed_convolutions_begin_at_their_weights(samples: Tensor, small_recipe: Recipe) -> None:
    recipe = with_fit(replace(small_recipe, protocol="all"), start="gptq", steps=0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    chain = prepare(network.eval(), samples).chain
    observe(chain, [samples])
    set_ranges(chain, plan_for(chain, recipe), recipe)
    part, data = part_of(chain, samples)
    start_by_columns(part, data)
    assert [layer.start is None for layer in chain.layers.values()] == [False, True, False]


def test_very_wide_layers_begin_at_their_weights(
    small_chain: Chain, samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pack_ptq.column_rounding.MOST_COLUMNS", 27)
    start_by_columns(*part_of(small_chain, samples))
    started = {path for path, layer in small_chain.layers.items() if layer.start is not None}
    assert started == {"stem", "head"}


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe\.reconstruction\.start is 'nearest'; allowed: weights, gptq"):
        Recipe(reconstruction=ReconstructionSpec(start="nearest"))  # type: ignore[arg-type]
