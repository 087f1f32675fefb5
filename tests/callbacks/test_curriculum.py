"""When a curriculum's losses are measured, and what they are."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pack_ptq import Hardware, Recipe, Workplace, reconstruct
from pack_ptq.callbacks.curriculum import Curriculum
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.easy_rows import EasyRows
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.types import Unit


class Scripted:
    step = -1

    def hard_errors(self, data: Any) -> Tensor:
        return torch.full((3,), float(self.step))


@pytest.mark.parametrize(("steps", "times", "measured"), [(20, 4, [-1, 4, 9, 14]), (20, 1, [-1]), (2, 4, [-1, 0, 1])])
def test_losses_are_measured_at_the_start_and_evenly(steps: int, times: int, measured: list[int]) -> None:
    rows, module = EasyRows(torch.zeros(3), 0.5, steps), Scripted()
    callback = Curriculum(None, rows, times)  # type: ignore[arg-type]
    callback.on_train_start(SimpleNamespace(), module)  # type: ignore[arg-type]
    seen = [rows.errors[0].item()]
    for step in range(steps):
        module.step = step
        callback.on_train_batch_end(SimpleNamespace(), module, None, None, step)  # type: ignore[arg-type]
        seen.append(rows.errors[0].item())
    assert sorted(set(seen)) == measured


def test_units_are_fitted_on_the_lowest_losses_first(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[int, float, float]] = []
    at = EasyRows.at

    def watched(rows: EasyRows, step: int, at_least: int) -> Tensor:
        chosen = at(rows, step, at_least)
        others = torch.ones(len(rows.errors), dtype=torch.bool)
        others[chosen] = False
        gap = float(rows.errors[others].min()) if others.any() else float("inf")
        seen.append((len(chosen), float(rows.errors[chosen].max()), gap))
        return chosen

    monkeypatch.setattr(EasyRows, "at", watched)
    recipe = replace(small_recipe, reconstruction=replace(small_recipe.reconstruction, steps=6, curriculum=0.5))
    results = reconstruct(small_chain, small_units[:1], batches, recipe, Workplace(hardware=Hardware("cpu")))
    assert [size for size, _, _ in seen] == [32, 38, 43, 48, 54, 59], "of 64"
    assert all(0 < largest <= gap for _, largest, gap in seen), "measured before the first batch"
    assert len(results) == 1


def test_losses_are_those_of_the_hard_codes(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first: list[Tensor] = []
    hard_errors = PackReconstruction.hard_errors
    monkeypatch.setattr(
        PackReconstruction, "hard_errors", lambda self, data: first.append(hard_errors(self, data)) or first[-1]
    )
    recipe = replace(small_recipe, reconstruction=replace(small_recipe.reconstruction, steps=1, curriculum=0.5))
    unit = small_units[0]
    with torch.no_grad():
        target = small_chain.run(samples, unit.start, unit.stop)
        with quantized(small_chain.layers.values(), "nearest"):
            change = small_chain.run(samples, unit.start, unit.stop) - target
    reconstruct(small_chain, [unit], batches, recipe, Workplace(hardware=Hardware("cpu")))
    assert torch.allclose(first[0], change.square().sum(1).flatten(1).mean(1), rtol=1e-3), "of every row"
