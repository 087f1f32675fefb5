"""Units fitted layer by layer, and units fitted with weights of their error."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_helpers import plan_for
from torch import Tensor, nn

from pack_ptq import Hardware, Recipe, UserError, Workplace, observe, prepare, reconstruct, set_ranges, tile_units
from pack_ptq.cache import MemoryBudget
from pack_ptq.fisher import squared_gradient
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.types import Unit, UnitResult

PLACE = Workplace(seed=3, hardware=Hardware("cpu"))
PLAIN = {"input_drop": 0.0, "inner_drop": 0.0}


def layerwise(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, reconstruction=replace(recipe.reconstruction, granularity="layer", **PLAIN, **settings))


def run(chain: Chain, units: list[Unit], batches: Any, recipe: Recipe) -> tuple[Chain, list[UnitResult]]:
    chain = copy.deepcopy(chain)
    return chain, reconstruct(chain, units, batches, recipe, PLACE)


def hardened(chain: Chain) -> list[Tensor]:
    layers = chain.layers.values()
    return [t for layer in layers for t in (layer.weight_quantizer.codes, layer.input_quantizer.scale.data)]


@torch.no_grad()
def reads(chain: Chain, x: Tensor, path: str) -> Tensor:
    """Give what a layer reads when the whole network runs as it is set."""
    seen: list[Tensor] = []
    handle = chain.layers[path].register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    chain.network(x)
    handle.remove()
    return seen[0]


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Note, by label, the data of every fit before its first step."""
    seen: dict[str, Any] = {}
    hard_loss = PackReconstruction.hard_loss

    def watched(module: PackReconstruction, data: Any, weights: Any = "settled") -> float:
        if module.label not in seen:
            rows = tuple(t.clone() for t in data.rows(slice(0, 64)))
            seen[module.label] = rows, data.target.budget.used, list(module.activation_scales)
        return hard_loss(module, data, weights)

    monkeypatch.setattr(PackReconstruction, "hard_loss", watched)
    return seen


def test_layers_fit_on_what_the_layers_before_really_give(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = watch(monkeypatch)
    chain, results = run(small_chain, small_units, batches, layerwise(small_recipe, steps=8))
    pack = [f"01 blocks.0..blocks.1/blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    assert list(seen) == ["00 stem", *pack, "02 blocks.2/conv1", "02 blocks.2/conv2", "03 head"]
    for (path, layer), (rows, _, _) in zip(chain.layers.items(), seen.values(), strict=True):
        switch(chain.layers.values(), "off", activations=False)
        full = reads(chain, samples, path)
        target = layer(full)
        switch(chain.layers.values(), "hard", activations=True)
        low = reads(chain, samples, path)
        for cached, expected in zip(rows, (full, low, target), strict=True):
            assert torch.allclose(cached, expected, atol=1e-4), path
    assert [result.steps for result in results] == [8, 32, 16, 8], "eight for each layer of the unit"
    for layer in chain.layers.values():
        quantizer, source = layer.weight_quantizer, layer.input_quantizer
        assert (quantizer.mode, quantizer.rounding, source.enabled, source.generator) == ("hard", None, True, None)
    assert not any(p.requires_grad for p in chain.network.parameters())


def test_results_are_errors_of_the_unit(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe
) -> None:
    chain, results = run(small_chain, small_units, batches, layerwise(small_recipe, steps=100))
    with torch.no_grad():
        for unit, result in zip(small_units, results, strict=True):
            switch(chain.layers.values(), "off", activations=False)
            target = chain.run(samples, 0, unit.stop)
            switch(chain.layers.values(), "hard", activations=True)
            low = chain.run(samples, 0, unit.start)
            final = chain.run(low, unit.start, unit.stop)
            with quantized(small_chain.layers.values(), "nearest"):
                nearest = small_chain.run(low, unit.start, unit.stop)
            for loss, output in ((result.final_loss, final), (result.nearest_loss, nearest)):
                assert loss == pytest.approx((output - target).square().sum(1).mean().item(), rel=1e-3)
    packs = [result for result in results if "blocks" in result.name]
    assert all(result.accepted and result.final_loss < result.nearest_loss for result in packs)


def test_caches_of_one_layer_at_a_time(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = watch(monkeypatch)
    run(small_chain, small_units, batches, layerwise(small_recipe, steps=2))
    one = 64 * 8 * 6 * 6 * 4
    used = {label: memory for label, (_, memory, _) in seen.items()}
    inside = [used[label] for label in used if "blocks" in label]
    assert inside == [6 * one] * 6, "three of the unit, three of the layer"


def test_rejected_layers_are_rounded_to_nearest(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    recipe = layerwise(small_recipe, steps=2, evaluations=1, rounding_lr=100.0)
    chain, results = run(small_chain, small_units, batches, recipe)
    rejected = [unit for unit, result in zip(small_units, results, strict=True) if not result.accepted]
    assert "blocks.2" in {unit.name for unit in rejected}
    for unit, result in zip(small_units, results, strict=True):
        if unit in rejected:
            assert result.final_loss == pytest.approx(result.nearest_loss, rel=1e-6)
            for path, layer in chain.layers_of(unit.start, unit.stop).items():
                first = small_chain.layers[path]
                nearest = first.weight_quantizer.nearest_codes(first.weight).byte()
                assert torch.equal(layer.weight_quantizer.codes, nearest)
                assert torch.equal(layer.input_quantizer.scale, first.input_quantizer.scale)


def test_no_steps_round_to_nearest(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    none = replace(small_recipe, reconstruction=replace(small_recipe.reconstruction, steps=0))
    whole, _ = run(small_chain, small_units, batches, none)
    layers, results = run(small_chain, small_units, batches, layerwise(none))
    assert all(torch.equal(a, b) for a, b in zip(hardened(whole), hardened(layers), strict=True))
    assert not any(result.accepted for result in results)


class Forked(nn.Module):
    """A block whose first layer and shortcut read the same tensor, and so share its quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def chain_of(block: nn.Module, batches: list[Tensor], recipe: Recipe) -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), block, nn.Flatten(), nn.Linear(8 * 36, 5))
    chain = prepare(network.eval(), batches[0]).chain
    observe(chain, batches)
    set_ranges(chain, plan_for(chain, recipe), recipe)
    return chain


def test_scale_of_a_shared_input_is_learned_by_the_first_layer_only(
    batches: list[Tensor], small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = chain_of(Forked(), batches, small_recipe)
    assert chain.layers["2.conv1"].input_quantizer is chain.layers["2.shortcut"].input_quantizer
    seen = watch(monkeypatch)
    chain, _ = run(chain, tile_units(chain, [(0, 1)]), batches, layerwise(small_recipe, steps=4))
    learned = {label: len(scales) for label, (_, _, scales) in seen.items()}
    assert learned == {"00 0": 1, "01 2/conv1": 1, "01 2/conv2": 1, "01 2/shortcut": 0, "02 4": 1}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(self.conv1(self.conv1(x))))


def test_layer_that_is_called_twice_is_refused_before_anything_is_read(
    batches: list[Tensor], small_recipe: Recipe
) -> None:
    chain = chain_of(Twice(), batches, small_recipe)
    with pytest.raises(UserError, match=r"granularity is 'layer', but 2\.conv1 is called 2 times; allowed: pack"):
        reconstruct(chain, tile_units(chain, [(0, 1)]), [], layerwise(small_recipe))


def test_layerwise_run_draws_the_same_and_resumes_by_unit(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    recipe = layerwise(small_recipe, steps=8)
    torch.manual_seed(0)
    whole, results = run(small_chain, small_units, batches, recipe)
    torch.manual_seed(1)
    again = copy.deepcopy(small_chain)

    def load(index: int) -> UnitResult | None:
        if index > 1:
            return None
        for path, layer in again.layers_of(small_units[index].start, small_units[index].stop).items():
            there = whole.layers[path]
            layer.weight_quantizer.set_codes(there.weight_quantizer.codes.clone(), there.weight_quantizer.scale.clone())
            layer.input_quantizer.scale.data = there.input_quantizer.scale.data.clone()
        return results[index]

    resumed = reconstruct(again, small_units, batches, recipe, PLACE, load=load)
    assert all(torch.equal(a, b) for a, b in zip(hardened(again), hardened(whole), strict=True))
    assert [r.final_loss for r in resumed] == [r.final_loss for r in results]


def test_fisher_weights_every_unit_and_leaves_no_memory_behind(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = watch(monkeypatch)
    budgets: list[MemoryBudget] = []
    make = MemoryBudget.__init__
    monkeypatch.setattr(MemoryBudget, "__init__", lambda self, *args: budgets.append(self) or make(self, *args))
    fitting = replace(small_recipe.reconstruction, loss="fisher", steps=40)
    _, results = run(small_chain, small_units, batches, replace(small_recipe, reconstruction=fitting))
    for unit, (rows, _, _) in zip(small_units, seen.values(), strict=True):
        with torch.no_grad():
            x = small_chain.run(samples, 0, unit.start)
        square = squared_gradient(small_chain, unit, x)
        assert torch.allclose(rows[3], square / square.mean(), rtol=1e-2, atol=1e-4), unit.name
    assert all(result.final_loss <= result.nearest_loss for result in results)
    assert any(result.accepted for result in results)
    assert [budget.used for budget in budgets] == [2 * 64 * 5 * 4], "the last unit's outputs in both networks"
