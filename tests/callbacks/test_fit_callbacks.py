"""Callbacks of a fit: the best iterate is kept, and TensorBoard shows the fit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from pack_ptq import Hardware, Recipe, Workplace, reconstruct
from pack_ptq.callbacks import KeepBest, RunProgress
from pack_ptq.graph.chain import Chain
from pack_ptq.types import Unit


class Scripted:
    """A module whose loss and codes after each step are written down."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.step = losses, 0
        weight = SimpleNamespace(
            rounding=torch.zeros(1),
            hardened=lambda: (torch.tensor(self.step), torch.tensor(0.5)),
            zero_point=torch.zeros(()),
        )
        layer = SimpleNamespace(weight_quantizer=weight, whole_correction=lambda weight: None)
        self.scale = torch.zeros(())
        self.part = SimpleNamespace(
            layers={"a": layer},
            quantizers=[SimpleNamespace(learned=lambda: {"scale": self.scale.clone()})],
        )
        self.label = "unit"

    def hard_loss(self, data: Any) -> float:
        return self.losses[self.step]


def watched(losses: list[float], steps: set[int]) -> KeepBest:
    best, module = KeepBest(None, steps), Scripted(losses)  # type: ignore[arg-type]
    for step in range(len(losses)):
        module.step = step
        module.scale.fill_(step)
        best.on_train_batch_end(SimpleNamespace(logger=None), module, None, None, step)  # type: ignore[arg-type]
    return best


@pytest.mark.parametrize(
    ("losses", "steps", "kept"),
    [
        ([5.0, 3.0, 4.0, 6.0], {1, 2, 3, 4}, 1),
        ([5.0, 3.0, 4.0, 6.0], {1, 3, 4}, 2),
        ([5.0, 3.0, 2.0, 2.0], {2, 3, 4}, 2),
        ([1.0, float("nan"), 2.0], {2, 3}, 2),
        ([4.0, float("inf")], {1, 2}, 0),
    ],
)
def test_lowest_measured_iterate_is_kept(losses: list[float], steps: set[int], kept: int) -> None:
    best = watched(losses, steps)
    assert best.loss == losses[kept]
    assert best.kept is not None
    (codes, scale, _), activation = best.kept.weights[0], best.kept.activations[0]["scale"]
    assert (codes.item(), scale.item(), activation.item()) == (kept, 0.5, kept), "a copy of that step"


def test_nothing_is_kept_of_a_fit_that_broke() -> None:
    best = watched([float("nan"), float("nan")], {1, 2})
    assert (best.loss, best.kept) == (float("inf"), None)


def test_tensorboard_shows_the_fit(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    place = Workplace(hardware=Hardware("cpu"), logger=logger)
    results = reconstruct(small_chain, small_units[:2], batches, small_recipe, place)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    label = "01 blocks.0..blocks.1"
    curves = {tag.removeprefix(f"{label}/") for tag in events.Tags()["scalars"] if tag.startswith(label)}
    scales = {f"activation_scale/{i}" for i in range(4)}
    assert curves == {"loss", "penalty", "settled", "hard_loss", *scales}
    losses = events.Scalars(f"{label}/loss")
    assert [event.step for event in losses] == [0, 50, 59], "every 50 steps, and the last one"
    assert all(event.value >= 0 for event in losses)
    assert events.Scalars(f"{label}/penalty")[0].value == 0
    assert events.Scalars(f"{label}/penalty")[-1].value > 0
    hard = events.Scalars(f"{label}/hard_loss")
    assert [event.step for event in hard] == [37, 44, 51, 59]
    if results[1].accepted:
        assert min(event.value for event in hard) == pytest.approx(results[1].final_loss, rel=1e-5)
    layers = [path for unit in small_units[:2] for path in small_chain.layers_of(unit.start, unit.stop)]
    expected = {f"weights_{when}/{path}" for when in ("before", "after") for path in layers}
    assert set(events.Tags()["histograms"]) == expected


def test_layers_of_a_unit_have_curves_and_a_bar_of_their_own(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    recipe = replace(small_recipe, reconstruction=replace(small_recipe.reconstruction, granularity="layer", steps=4))
    reconstruct(small_chain, small_units, batches, recipe, Workplace(hardware=Hardware("cpu"), logger=logger))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    labels = {tag.removesuffix("/hard_loss") for tag in events.Tags()["scalars"] if tag.endswith("/hard_loss")}
    inner = {f"01 blocks.0..blocks.1/blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)}
    assert labels == {"00 stem", *inner, "02 blocks.2/conv1", "02 blocks.2/conv2", "03 head"}
    assert {f"weights_after/{path}" for path in small_chain.layers} <= set(events.Tags()["histograms"])
    progress = RunProgress(small_units, 4, enabled=False)
    progress.on_fit_start(None, SimpleNamespace(label="02 blocks.2/conv1"))  # type: ignore[arg-type]
    assert progress.steps.desc == "02 blocks.2/conv1: "
