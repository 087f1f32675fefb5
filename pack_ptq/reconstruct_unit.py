"""Fit one unit of the chain to its cached activations: as a whole, or layer by layer."""

import time
from dataclasses import dataclass, replace

from lightning.pytorch.loggers import Logger
from torch import Tensor

from pack_ptq.cache import fill
from pack_ptq.callbacks.keep_best import KeepBest
from pack_ptq.callbacks.monitor import ReconstructionMonitor
from pack_ptq.callbacks.progress import RunProgress
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part, layer_part, layer_rows, unit_part
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.modules.reconstruction import PackData, PackReconstruction, loader, output_error
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.schedules import evaluation_steps
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Hardware, Recipe, ReconstructionSpec, Unit, UnitResult
from pack_ptq.views import derived_seed

Outcome = tuple[float, float, bool]  # output error rounded to nearest, and as it is kept; whether a fit is kept


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
    spec, steps = recipe.reconstruction, recipe.steps
    if spec.granularity == "layer":
        outcome = _fit_layers(chain, unit, data, recipe, seed, place, label)
        steps *= len(chain.layers_of(unit.start, unit.stop))
    else:
        outcome = fit_part(unit_part(chain, unit, label), data, spec, steps, seed, place)
    return UnitResult(unit.name, unit.blocks, steps, *outcome, time.perf_counter() - began)


def fit_part(part: Part, data: PackData, spec: ReconstructionSpec, steps: int, seed: int, place: Workplace) -> Outcome:
    """Fit one part and leave its layers with hard codes: the best iterate, or rounding to nearest if that is better."""
    module = PackReconstruction(part, spec, steps, seed)
    started_at = [layer.input_quantizer.scale.detach().clone() for layer in module.layers]
    nearest_loss = module.hard_loss(data, "nearest")
    best = KeepBest(data, evaluation_steps(steps, spec.evaluations))
    if steps:
        callbacks = [best, ReconstructionMonitor(), *([place.progress] if place.progress else [])]
        trainer = make_trainer(place.hardware, callbacks, place.logger, max_steps=steps)
        trainer.fit(module, loader(data, spec.batch_size, steps, seed))
    accepted = bool(best.kept) and best.loss <= nearest_loss  # nothing is kept of a fit whose losses overflow
    module.to(data.target.budget.device)  # Lightning has moved the layers to the CPU
    for index, layer in enumerate(module.layers):
        quantizer = layer.weight_quantizer
        if accepted:
            codes, scale, input_scale = best.kept[index]
        else:
            codes, scale, input_scale = quantizer.nearest_codes(layer.weight), quantizer.scale, started_at[index]
        quantizer.set_codes(codes.to(layer.weight.device), scale.to(layer.weight.device))
        layer.input_quantizer.scale.data = input_scale.to(layer.weight.device)
    module.end()
    return nearest_loss, best.loss if accepted else nearest_loss, accepted


def _fit_layers(
    chain: Chain, unit: Unit, data: PackData, recipe: Recipe, seed: int, place: Workplace, label: str
) -> Outcome:
    """Fit the layers of a unit in execution order, each alone (AdaRound); the errors given are the unit's."""
    spec, whole = recipe.reconstruction, unit_part(chain, unit, label)
    with quantized(whole.layers.values(), "nearest"):
        nearest_loss = output_error(whole.run, data)
    done: list[QuantizedLayer] = []
    accepted = False
    for index, (path, rows) in enumerate(layer_rows(chain, list(whole.layers)).items()):
        part, layer = layer_part(chain, unit, path, label), whole.layers[path]
        values = _layer_data(chain, unit, path, rows, data, done, spec.batch_size)
        # Layers that read the same tensor share its scale; moving it again would undo the fit of the first.
        is_free = all(other.input_quantizer is not layer.input_quantizer for other in done)
        of_layer = replace(
            spec,
            batch_size=spec.batch_size * rows,
            activation_scale_lr=spec.activation_scale_lr if is_free else 0.0,
        )
        accepted |= fit_part(part, values, of_layer, recipe.steps, derived_seed(seed, index), place)[2]
        values.close()
        switch([layer], "off", activations=False)
        done.append(layer)
    with quantized(whole.layers.values(), "hard"):
        return nearest_loss, output_error(whole.run, data), accepted


def _layer_data(
    chain: Chain, unit: Unit, path: str, rows: int, data: PackData, done: list[QuantizedLayer], batch_size: int
) -> PackData:
    """Cache what a layer reads in both networks, behind the layers that are `done`, and its full-precision output.

    Args:
        chain: The prepared network, all quantizers off.
        unit: That the layer belongs to.
        path: Of the layer.
        rows: Of the layer's input per sample.
        data: Of the unit.
        done: Layers of the unit with hard codes.
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
