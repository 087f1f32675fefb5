"""Fit one part to its cached activations: what comes before roundings, if wanted, then roundings and scales."""

from dataclasses import dataclass, replace

import lightning as L
import torch

from pack_ptq.activation_noise import add_noise
from pack_ptq.bias_correction import bias_rate, correct_biases
from pack_ptq.callbacks.curriculum import Curriculum
from pack_ptq.callbacks.keep_best import KeepBest
from pack_ptq.callbacks.monitor import ReconstructionMonitor
from pack_ptq.column_rounding import start_by_columns
from pack_ptq.compensation import compensate, linear_layers
from pack_ptq.graph.part import Part
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.easy_rows import EasyRows
from pack_ptq.modules.output_error import output_error
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.random_batches import RandomBatches
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.schedules import evaluation_steps
from pack_ptq.snapshot import Snapshot
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Recipe
from pack_ptq.views import derived_seed
from pack_ptq.workplace import Workplace


@dataclass(frozen=True)
class Outcome:
    """How the fit of a unit or a layer went; for the attributes see `UnitResult`."""

    nearest_loss: float
    final_loss: float
    accepted: bool
    steps: int
    ranks: dict[str, int]


def fit_part(part: Part, data: PackData, recipe: Recipe, place: Workplace) -> Outcome:
    """Fit one part and leave its layers with hard codes: the best iterate, or rounding to nearest if that is better.

    Args:
        part: Its ranges must be set; all its quantizers are off before.
        data: Cached activations.
        recipe: Settings and number of steps.
        place: Where to run; its seed is of this part and process.
    """
    spec = recipe.reconstruction
    if recipe.activation_noise == "searched":
        add_noise(part, data, derived_seed(place.seed, "noise"))
    is_compensated = spec.low_rank.search_steps > 0 and bool(linear_layers(part))
    if not is_compensated and spec.start == "weights":
        return _fit_rounding(part, data, recipe, place)
    nearest = Snapshot.of(part)
    with quantized(part.operations, "nearest"):
        nearest_loss = output_error(part.run, data)
    ranks = compensate(part, data, spec, recipe.weight, place) if is_compensated else {}
    if spec.start == "gptq":
        start_by_columns(part, data)
    fitted = _fit_rounding(part, data, recipe, place)
    for layer in part.layers.values():
        layer.compensation = layer.start = None  # the codes carry them
    steps = fitted.steps + (spec.low_rank.search_steps + spec.low_rank.fit_steps if is_compensated else 0)
    if fitted.final_loss < nearest_loss:
        return Outcome(nearest_loss, fitted.final_loss, True, steps, ranks)
    nearest.put_back(part)
    return Outcome(nearest_loss, nearest_loss, False, steps, {})


def _fit_rounding(part: Part, data: PackData, recipe: Recipe, place: Workplace) -> Outcome:
    """Fit the rounding of the weights from where it begins, and the scales."""
    steps = recipe.steps
    spec = replace(recipe.reconstruction, bias_lr=bias_rate(part, recipe.reconstruction))
    errors = correct_biases(part, data) if spec.bias_lr and steps else []
    nearest = Snapshot.of(part)
    module = PackReconstruction(part, spec, steps, place.seed, errors)
    nearest_loss = module.hard_loss(data, "nearest")
    best = KeepBest(data, evaluation_steps(steps, spec.evaluations))
    if steps:
        callbacks: list[L.Callback] = [best, ReconstructionMonitor(), *place.callbacks]
        easy = None
        if spec.curriculum is not None:
            easy = EasyRows(torch.zeros(len(data.target)), spec.curriculum, steps)
            callbacks.append(Curriculum(data, easy))
        trainer = make_trainer(place.hardware, callbacks, place.logger, max_steps=steps)
        trainer.fit(module, RandomBatches(data, spec.batch_size, steps, place.seed, easy=easy).loader())
    module.to(data.target.budget.device)  # Lightning has moved the layers to the CPU
    module.end()
    if best.kept is not None and best.loss <= nearest_loss:  # nothing is kept of a fit whose losses overflow
        best.kept.put_back(part)
        return Outcome(nearest_loss, best.loss, True, steps, {})
    nearest.put_back(part)
    return Outcome(nearest_loss, nearest_loss, False, steps, {})
