"""Reconstruction of whole networks: better than rounding to nearest, hard codes, the same for the same seed."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pack_ptq import (
    Hardware,
    QuantizerSpec,
    Recipe,
    ReconstructionSpec,
    UserError,
    Workplace,
    hessian_packs,
    inner_links,
    observe,
    plan_bits,
    prepare,
    reconstruct,
    score_blocks,
    set_ranges,
    tile_units,
)
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.held_out import held_out_rows
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.types import TuningSpec, Unit, UnitResult
from pack_ptq.views import derived_seed

PLACE = Workplace(hardware=Hardware("cpu"))


def fitted(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, reconstruction=replace(recipe.reconstruction, **settings))


def run(
    chain: Chain, units: list[Unit], batches: Any, recipe: Recipe, place: Workplace = PLACE, **settings: Any
) -> tuple[Chain, list[UnitResult]]:
    chain = copy.deepcopy(chain)
    return chain, reconstruct(chain, units, batches, recipe, place, **settings)


def state(chain: Chain) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in chain.network.state_dict().items()}


def equal(a: Chain, b: Chain) -> bool:
    first, second = state(a), state(b)
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


@torch.no_grad()
def error(chain: Chain, x: Tensor, weights: Any) -> float:
    switch(chain.layers.values(), "off", activations=False)
    target = chain.network(x)
    switch(chain.layers.values(), weights, activations=True)
    return (chain.network(x) - target).square().mean().item()


def test_fit_is_better_than_rounding_to_nearest(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe
) -> None:
    nearest = error(small_chain, samples, "nearest")
    chain, results = run(small_chain, small_units, batches, fitted(small_recipe, steps=150))
    assert [result.name for result in results] == [unit.name for unit in small_units]
    assert all(result.final_loss <= result.nearest_loss for result in results)
    packs = [result for result in results if "blocks" in result.name]
    assert all(result.accepted and result.final_loss < 0.95 * result.nearest_loss for result in packs)
    assert all(result.steps == 150 and result.seconds > 0 for result in results)
    assert error(chain, samples, "hard") < 0.8 * nearest


def test_codes_are_hard_and_quantizers_restored(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    before = {path: layer.weight.clone() for path, layer in small_chain.layers.items()}
    chain, _ = run(small_chain, small_units, batches, fitted(small_recipe, steps=20))
    for path, layer in chain.layers.items():
        quantizer, source = layer.weight_quantizer, layer.input_quantizer
        assert (quantizer.mode, source.enabled, source.drop, source.generator) == ("hard", True, 0.0, None)
        assert quantizer.rounding is None
        assert quantizer.log_factor is None
        assert quantizer.codes is not None
        assert quantizer.codes.dtype == torch.uint8
        assert int(quantizer.codes.max()) <= 2**quantizer.bits - 1
        assert quantizer.codes.shape == layer.weight.shape
        assert torch.equal(layer.weight, before[path]), "the full-precision weight is not touched"
    assert not any(p.requires_grad for p in chain.network.parameters())


def test_results_are_losses_of_the_network_as_it_is_left(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe
) -> None:
    chain, results = run(small_chain, small_units, batches, fitted(small_recipe, steps=20))
    with torch.no_grad():
        low = full = samples
        for unit, result in zip(small_units, results, strict=True):
            switch(chain.layers.values(), "off", activations=False)
            full = chain.run(full, unit.start, unit.stop)
            switch(chain.layers.values(), "nearest", activations=True)
            if not result.accepted:
                assert result.final_loss == result.nearest_loss
            switch(chain.layers.values(), "hard", activations=True)
            low = chain.run(low, unit.start, unit.stop)
            assert result.final_loss == pytest.approx((low - full).square().sum(1).mean().item(), rel=1e-4)


def test_same_seed_same_bits_whatever_the_global_generator(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    recipe = fitted(small_recipe, steps=15, weight_scale_lr=1e-3)
    chains = []
    for global_seed, seed in ((0, 4), (1, 4), (0, 5)):
        torch.manual_seed(global_seed)
        chains.append(run(small_chain, small_units, batches, recipe, replace(PLACE, seed=seed))[0])
    assert equal(chains[0], chains[1])
    assert not equal(chains[0], chains[2])


@pytest.mark.parametrize(("steps", "share", "left_out"), [(9, 0.125, 8), (9, 0.25, 16), (0, 0.25, 0)])
def test_samples_that_judge_the_last_pass_are_not_fitted_to(
    steps: int, share: float, left_out: int, small_chain: Chain, small_units: list[Unit], samples: Tensor,
    small_recipe: Recipe,
) -> None:  # fmt: skip
    recipe = replace(fitted(small_recipe, steps=5), tuning=TuningSpec(steps=steps, held_out=share))
    left = held_out_rows(recipe, 64, PLACE.seed).tolist()
    assert len(left) == left_out
    others, one_more = samples.clone(), samples.clone()
    others[left] += 1
    one_more[next(row for row in range(64) if row not in left)] += 1
    chains = [run(small_chain, small_units, x.split(16), recipe)[0] for x in (samples, others, one_more)]
    assert equal(chains[0], chains[1])
    assert not equal(chains[0], chains[2])


def test_a_single_sample_is_fitted_to(small_chain: Chain, small_units: list[Unit], samples: Tensor) -> None:
    recipe = Recipe(reconstruction=ReconstructionSpec(steps=2, batch_size=2))
    _, results = run(small_chain, small_units, [samples[:1]], recipe)
    assert [result.steps for result in results] == [2] * len(small_units)


def test_seeds_differ_by_unit_process_and_run() -> None:
    seeds = {derived_seed(seed, unit, rank) for seed in range(8) for unit in range(8) for rank in range(8)}
    assert len(seeds) == 512
    assert derived_seed(3, 4, 0) == derived_seed(3, 4, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_memory_mapped_cache_changes_nothing(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batches = samples.split(16)
    recipe = fitted(small_recipe, steps=15)
    in_memory, results = run(small_chain, small_units, batches, recipe)
    sizes: list[int] = []
    fallocate = os.posix_fallocate

    def counted(descriptor: int, start: int, size: int) -> None:
        sizes.append(size)
        fallocate(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", counted)
    largest_batch, place = 16 * 8 * 6 * 6 * 4, replace(PLACE, folder=tmp_path)
    mapped, mapped_results = run(small_chain, small_units, batches, fitted(recipe, cache_bytes=largest_batch), place)
    assert max(sizes) == 64 * 8 * 6 * 6 * 4
    assert len(sizes) >= 6
    assert list(tmp_path.iterdir()) == []
    assert equal(in_memory, mapped)
    assert [r.final_loss for r in mapped_results] == [r.final_loss for r in results]
    with pytest.raises(
        UserError, match=rf"recipe\.reconstruction\.cache_bytes is {largest_batch - 1}; allowed: {largest_batch}"
    ):
        run(small_chain, small_units, batches, fitted(recipe, cache_bytes=largest_batch - 1), place)


@pytest.mark.parametrize("settings", [{"rounding_lr": 100.0, "input_drop": 0.0}, {"activation_scale_lr": 1e3}])
def test_worse_fit_is_rejected_and_rounding_to_nearest_kept(
    small_chain: Chain,
    small_units: list[Unit],
    batches: list[Tensor],
    samples: Tensor,
    small_recipe: Recipe,
    settings: dict,
) -> None:
    recipe = fitted(small_recipe, steps=2, evaluations=1, **settings)
    chain, results = run(small_chain, small_units, batches, recipe)
    rejected = [unit for unit, result in zip(small_units, results, strict=True) if not result.accepted]
    assert {"blocks.0..blocks.1", "blocks.2"} <= {unit.name for unit in rejected}
    for unit in rejected:
        for path, layer in chain.layers_of(unit.start, unit.stop).items():
            first = small_chain.layers[path]
            assert torch.equal(layer.weight_quantizer.codes, first.weight_quantizer.nearest_codes(first.weight).byte())
            assert torch.equal(layer.weight_quantizer.scale, first.weight_quantizer.scale)
            assert torch.equal(layer.input_quantizer.scale, first.input_quantizer.scale)
    for result in results:
        assert result.final_loss == result.nearest_loss or result.accepted
    if len(rejected) == len(small_units):
        assert error(chain, samples, "hard") == error(small_chain, samples, "nearest")


def test_scales_are_learned_as_asked(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    for weight_rate, activation_rate in ((0.0, 0.0), (3e-3, 0.0), (0.0, 1e-3)):
        recipe = fitted(small_recipe, steps=120, weight_scale_lr=weight_rate, activation_scale_lr=activation_rate)
        chain, results = run(small_chain, small_units[:2], batches, recipe)
        assert results[1].accepted
        for path, layer in chain.layers_of(1, 3).items():
            first = small_chain.layers[path]
            kept = torch.equal(layer.weight_quantizer.scale, first.weight_quantizer.scale)
            assert kept == (weight_rate == 0)
            assert torch.equal(layer.input_quantizer.scale, first.input_quantizer.scale) == (activation_rate == 0)
            assert (layer.weight_quantizer.scale > 0).all()


class Careful(nn.Module):
    """Holds what behaves differently in training: dropout, and a norm that no layer precedes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.middle, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training or self.norm.training or self.drop.training)
        x = self.drop(self.norm(F.gelu(self.stem(x))))
        return self.head(F.gelu(self.middle(x)).mean((2, 3)))


def public_run(network: nn.Module, batches: Any, first: Tensor, recipe: Recipe) -> tuple[Chain, list[UnitResult]]:
    """Take the steps that the README shows for plain objects."""
    chain = prepare(network, first).chain
    start, stop = inner_links(chain)
    observe(chain, batches)
    every = [list(chain.layers)]
    set_ranges(chain, plan_bits(every, [(recipe.weight.bits, recipe.activation.bits)], recipe), recipe)
    scores = score_blocks(chain, batches, start, stop)
    units = tile_units(chain, hessian_packs(list(scores.scores)))
    assert [link for unit in units for link in range(unit.start, unit.stop)] == list(range(len(chain)))
    layers = [list(chain.layers_of(unit.start, unit.stop)) for unit in units]
    plan = plan_bits(layers, [(recipe.weight.bits, recipe.activation.bits)] * len(units), recipe)
    set_ranges(chain, plan, recipe)
    return chain, reconstruct(chain, units, batches, recipe, PLACE)


def test_public_steps_on_a_plain_module_and_a_list(
    small_network: nn.Module, batches: list[Tensor], small_recipe: Recipe
) -> None:
    before = {k: v.clone() for k, v in small_network.state_dict().items()}
    chain, results = public_run(small_network, batches, batches[0], small_recipe)
    assert sum(len(result.blocks) for result in results) == 5
    with torch.no_grad():
        full, low = small_network(batches[1]), chain.network(batches[1])
    assert 0 < (low - full).square().mean() < 0.1 * full.square().mean()
    assert all(torch.equal(v, before[k]) for k, v in small_network.state_dict().items())


def test_nothing_runs_in_training_mode(samples: Tensor) -> None:
    recipe = Recipe(reconstruction=ReconstructionSpec(steps=6, batch_size=8))
    network = Careful()
    with torch.no_grad():
        network.norm.running_mean.normal_()
    chain, _ = public_run(network.eval(), list(samples.split(16)), samples[:4], recipe)
    assert len(chain.network.modes) > 20
    assert not any(chain.network.modes)
    assert torch.equal(chain.network.norm.running_mean, network.norm.running_mean)
    assert int(chain.network.norm.num_batches_tracked) == 0


def test_labelled_batches_from_a_loader_give_the_same(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe
) -> None:
    recipe = fitted(small_recipe, steps=4)
    labelled = DataLoader(TensorDataset(samples, torch.zeros(64)), batch_size=24)
    first, _ = run(small_chain, small_units, samples.split(24), recipe)
    second, _ = run(small_chain, small_units, labelled, recipe)
    assert equal(first, second)


def test_units_fit_on_what_the_units_before_really_give(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    hard_loss = PackReconstruction.hard_loss

    def watched(module: PackReconstruction, data: Any, weights: Any = "settled") -> float:
        seen.setdefault(module.label.split()[1], tuple(t.clone() for t in data.rows(slice(0, 64))))
        return hard_loss(module, data, weights)

    monkeypatch.setattr(PackReconstruction, "hard_loss", watched)
    chain, _ = run(small_chain, small_units, batches, fitted(small_recipe, steps=4))
    with torch.no_grad():
        for unit in small_units:
            switch(chain.layers.values(), "off", activations=False)
            full, target = chain.run(samples, 0, unit.start), chain.run(samples, 0, unit.stop)
            switch(chain.layers.values(), "hard", activations=True)
            low = chain.run(samples, 0, unit.start)
            for cached, expected in zip(seen[unit.name], (full, low, target), strict=True):
                assert torch.allclose(cached, expected, atol=1e-4), unit.name


def test_finished_units_are_loaded_and_new_ones_saved(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    recipe = fitted(small_recipe, steps=8)
    saved: list[int] = []
    whole, results = run(
        small_chain, small_units, batches, recipe, save=lambda index, unit, result: saved.append(index)
    )
    assert saved == [0, 1, 2, 3]
    again = copy.deepcopy(small_chain)

    def load(index: int) -> UnitResult | None:
        if index not in (0, 1):
            return None
        unit = small_units[index]
        for path, layer in again.layers_of(unit.start, unit.stop).items():
            there = whole.layers[path]
            layer.weight_quantizer.set_codes(there.weight_quantizer.codes.clone(), there.weight_quantizer.scale.clone())
            layer.input_quantizer.scale.data = there.input_quantizer.scale.data.clone()
        return results[index]

    saved.clear()
    resumed = reconstruct(
        again,
        small_units,
        batches,
        recipe,
        PLACE,
        load=load,
        save=lambda index, unit, result: saved.append(index),
    )
    assert saved == [2, 3]
    assert resumed[:2] == results[:2]
    assert equal(again, whole)


def test_deploy_profile_and_two_bits(small_network: nn.Module, batches: list[Tensor]) -> None:
    recipe = Recipe(
        QuantizerSpec(bits=2), QuantizerSpec(bits=4, per_channel=False), profile="deploy", protocol="all",
        reconstruction=ReconstructionSpec(steps=30, batch_size=16),
    )  # fmt: skip
    chain, results = public_run(small_network, batches, batches[0], recipe)
    for layer in chain.layers.values():
        assert layer.weight_quantizer.codes.dtype == torch.int8
        assert layer.weight_quantizer.codes.min() >= -2
        assert layer.weight_quantizer.codes.max() <= 1
        assert (layer.weight_quantizer.zero_point == 0).all()
    assert chain.layers["stem"].input_quantizer.bits is None
    assert all(result.final_loss <= result.nearest_loss for result in results)


def test_network_with_huge_outputs_ends_without_a_traceback(samples: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    for layer in network[::2]:
        layer.weight.data *= 1e9
    recipe = Recipe(reconstruction=ReconstructionSpec(steps=4, batch_size=16))
    chain, results = public_run(network, [samples], samples[:4], recipe)
    assert not all(result.accepted for result in results)
    assert all(layer.weight_quantizer.codes is not None for layer in chain.layers.values())
