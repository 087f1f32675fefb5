"""Fit one unit of the chain to its cached activations: as a whole, or layer by layer."""

import time
from dataclasses import dataclass, replace

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from pack_ptq.bias_correction import bias_rate, correct_biases
from pack_ptq.cache import fill
from pack_ptq.callbacks.curriculum import Curriculum
from pack_ptq.callbacks.keep_best import KeepBest
from pack_ptq.callbacks.monitor import ReconstructionMonitor
from pack_ptq.callbacks.progress import RunProgress
from pack_ptq.compensation import Ranges, compensate, linear_layers
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part, layer_part, layer_rows, unit_part
from pack_ptq.graph.switch import Operations, quantized, switch
from pack_ptq.modules.easy_rows import EasyRows
from pack_ptq.modules.reconstruction import PackData, PackReconstruction, loader, output_error
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.schedules import evaluation_steps
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Hardware, Recipe, ReconstructionSpec, Unit, UnitResult
from pack_ptq.views import derived_seed


@dataclass(frozen=True)
class Outcome:
    """How the fit of a unit or a layer went; for the attributes see `UnitResult`."""

    nearest_loss: float
    final_loss: float
    accepted: bool
    steps: int
    ranks: dict[str, int]


@dataclass(frozen=True)
class Workplace:
    """Where fits run, and what shows them: TensorBoard and the bars of the run."""

    hardware: Hardware
    logger: Logger | None = None
    progress: RunProgress | None = None


def reconstruct_unit(
    chain: Chain, unit: Unit, data: PackData, recipe: Recipe, seed: int, place: Workplace, label: str
) -> UnitResult:
    """Fit one unit and leave its layers with hard codes.

    Args:
        chain: The prepared network with its ranges set, all quantizers off.
        unit: The links to fit.
        data: Cached activations.
        recipe: Settings and number of steps.
        seed: Of this unit and process.
        place: Where to run.
        label: Of the curves in TensorBoard.
    """
    began = time.perf_counter()
    if recipe.reconstruction.granularity == "layer":
        fitted = _fit_layers(chain, unit, data, recipe, seed, place, label)
    else:
        fitted = fit_part(unit_part(chain, unit, label), data, recipe, seed, place)
    seconds = time.perf_counter() - began
    losses = fitted.nearest_loss, fitted.final_loss, fitted.accepted
    return UnitResult(unit.name, unit.blocks, fitted.steps, *losses, seconds, fitted.ranks)


def fit_part(part: Part, data: PackData, recipe: Recipe, seed: int, place: Workplace) -> Outcome:
    """Fit one part and leave its layers with hard codes: the best iterate, or rounding to nearest if that is better."""
    spec = recipe.reconstruction
    if not spec.low_rank.search_steps or not linear_layers(part):
        return _fit_rounding(part, data, spec, recipe.steps, seed, place)
    before = Ranges(part)
    with quantized(part.operations, "nearest"):
        nearest_loss = output_error(part.run, data)
    bars: list[L.Callback] = [place.progress] if place.progress else []
    ranks = compensate(part, data, spec, recipe.weight, seed, place.hardware, bars)
    fitted = _fit_rounding(part, data, spec, recipe.steps, seed, place)
    for layer in part.layers.values():
        layer.compensation = None  # the codes carry it
    steps = fitted.steps + spec.low_rank.search_steps + spec.low_rank.fit_steps
    if fitted.final_loss < nearest_loss:
        return Outcome(nearest_loss, fitted.final_loss, True, steps, ranks)
    before.put_back()
    return Outcome(nearest_loss, nearest_loss, False, steps, {})


def _fit_rounding(
    part: Part, data: PackData, spec: ReconstructionSpec, steps: int, seed: int, place: Workplace
) -> Outcome:
    """Fit the rounding of the weights as they are compensated, and the scales."""
    spec = replace(spec, bias_lr=bias_rate(part, spec))
    errors = correct_biases(part, data) if spec.bias_lr and steps else []
    module = PackReconstruction(part, spec, steps, seed, errors)
    started_at, corrections = [quantizer.learned() for quantizer in module.quantizers], module.corrections()
    nearest_loss = module.hard_loss(data, "nearest")
    best = KeepBest(data, evaluation_steps(steps, spec.evaluations))
    if steps:
        callbacks: list[L.Callback] = [best, ReconstructionMonitor(), *([place.progress] if place.progress else [])]
        easy = None
        if spec.curriculum is not None:
            easy = EasyRows(torch.zeros(len(data.target)), spec.curriculum, steps)
            callbacks.append(Curriculum(data, easy))
        trainer = make_trainer(place.hardware, callbacks, place.logger, max_steps=steps)
        trainer.fit(module, loader(data, spec.batch_size, steps, seed, easy=easy))
    accepted = bool(best.kept) and best.loss <= nearest_loss  # nothing is kept of a fit whose losses overflow
    module.to(data.target.budget.device)  # Lightning has moved the layers to the CPU
    for index, layer in enumerate(module.layers):
        quantizer = layer.weight_quantizer
        if accepted:
            codes, scale = best.kept[index]
        else:
            codes, scale = quantizer.nearest_codes(layer.compensated_weight), quantizer.scale
        quantizer.set_codes(codes.to(layer.weight.device), scale.to(layer.weight.device))
    for activation, learned in zip(module.quantizers, best.kept_activations if accepted else started_at, strict=True):
        activation.put_learned(learned)
    for layer, correction in zip(module.layers, best.kept_corrections if accepted else corrections, strict=True):
        if layer.correction is not None and correction is not None:
            layer.correction.data = correction.to(layer.weight.device)
    module.end()
    return Outcome(nearest_loss, best.loss if accepted else nearest_loss, accepted, steps, {})


def _fit_layers(
    chain: Chain, unit: Unit, data: PackData, recipe: Recipe, seed: int, place: Workplace, label: str
) -> Outcome:
    """Fit the layers of a unit in execution order, each alone (AdaRound); the errors given are the unit's."""
    spec, whole = recipe.reconstruction, unit_part(chain, unit, label)
    with quantized(whole.operations, "nearest"):
        nearest_loss = output_error(whole.run, data)
    done: list[QuantizedLayer] = []
    outcomes: list[Outcome] = []
    for index, (path, rows) in enumerate(layer_rows(chain, list(whole.layers)).items()):
        part, layer = layer_part(chain, unit, path, label), whole.layers[path]
        before: Operations = [*done, *whole.products.values()]
        values = _layer_data(chain, unit, path, rows, data, before, spec.batch_size)
        # Layers that read the same tensor share its scale; moving it again would undo the fit of the first.
        is_free = all(other.input_quantizer is not layer.input_quantizer for other in done)
        of_layer = replace(
            spec,
            batch_size=spec.batch_size * rows,
            activation_scale_lr=spec.activation_scale_lr if is_free else 0.0,
        )
        alone = replace(recipe, reconstruction=of_layer)
        outcomes.append(fit_part(part, values, alone, derived_seed(seed, index), place))
        values.close()
        switch([layer], "off", activations=False)
        done.append(layer)
    with quantized(whole.operations, "hard"):
        final_loss = output_error(whole.run, data)
    accepted, steps = any(each.accepted for each in outcomes), sum(each.steps for each in outcomes)
    ranks = {path: rank for each in outcomes for path, rank in each.ranks.items()}
    return Outcome(nearest_loss, final_loss, accepted, steps, ranks)


def _layer_data(
    chain: Chain, unit: Unit, path: str, rows: int, data: PackData, done: Operations, batch_size: int
) -> PackData:
    """Cache what a layer reads in both networks, behind the layers that are `done`, and its full-precision output.

    Args:
        chain: The prepared network, all quantizers off.
        unit: That the layer belongs to.
        path: Of the layer.
        rows: Of the layer's input per sample.
        data: Of the unit.
        done: Layers of the unit with hard codes, and its products.
        batch_size: Samples of one pass.
    """
    budget, count = data.target.budget, rows * len(data.target)

    def read(x: Tensor) -> Tensor:
        return chain.layer_input(x, unit.start, path)

    full = fill(budget, count, data.full_input.batches(batch_size), read)
    target = fill(budget, count, full.batches(batch_size * rows), chain.layers[path])
    with quantized(done, "hard"):
        low = fill(budget, count, data.quantized_input.batches(batch_size), read)
    return PackData(full, low, target)
