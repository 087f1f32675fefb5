"""Reconstruct the units of a chain one after the other, each on what the ones before it really give."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from pack_ptq.cache import MemoryBudget, Storage, fill
from pack_ptq.callbacks.keep_best import KeepBest
from pack_ptq.callbacks.monitor import ReconstructionMonitor
from pack_ptq.callbacks.progress import RunProgress
from pack_ptq.distributed import world
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.modules.reconstruction import PackData, PackReconstruction, loader
from pack_ptq.schedules import evaluation_steps
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Hardware, Recipe, Unit, UnitResult
from pack_ptq.views import Augment, Views, derived_seed

Load = Callable[[int], UnitResult | None]
Save = Callable[[int, Unit, UnitResult], None]


def check_cache(chain: Chain, batch_size: int, limit: int) -> None:
    """Refuse a cache budget below one batch of any boundary of the chain, before any work starts.

    Args:
        chain: The prepared network.
        batch_size: Samples of one calibration batch.
        limit: Bytes of the budget.

    Raises:
        UserError: One batch is larger than the limit; the message names the bytes that the largest one takes.
    """
    boundaries = [chain.trace.calls[element.stop].output for element in chain.elements]
    batches = [torch.empty(shape.at(batch_size), dtype=shape.dtype, device="meta") for shape in boundaries]
    batches.append(torch.empty((batch_size, *chain.input_shape), device="meta"))
    MemoryBudget(limit).check_batch(max(batches, key=lambda batch: batch.nbytes))


def reconstruct_unit(
    chain: Chain,
    unit: Unit,
    data: PackData,
    recipe: Recipe,
    seed: int,
    hardware: Hardware,
    logger: Logger | None = None,
    progress: RunProgress | None = None,
    label: str | None = None,
) -> UnitResult:
    """Fit one unit and leave its layers with hard codes: the best iterate, or rounding to nearest if that is better.

    Args:
        chain: The prepared network with its ranges set.
        unit: The links to fit.
        data: Cached activations.
        recipe: Settings and number of steps.
        seed: Of this unit and process.
        hardware: Where to run.
        logger: For TensorBoard.
        progress: Bars to move.
        label: Of the curves in TensorBoard.
    """
    began = time.perf_counter()
    spec, steps = recipe.reconstruction, recipe.steps
    module = PackReconstruction(chain, unit, spec, steps, seed)
    module.label = label or unit.name
    started_at = [layer.input_quantizer.scale.detach().clone() for layer in module.layers]
    nearest_loss = module.hard_loss(data, "nearest")
    best = KeepBest(data, evaluation_steps(steps, spec.evaluations))
    if steps:
        callbacks = [best, ReconstructionMonitor(), *([progress] if progress else [])]
        trainer = make_trainer(hardware, callbacks, logger, max_steps=steps)
        trainer.fit(module, loader(data, spec.batch_size, steps, seed))
    accepted = bool(best.kept) and best.loss <= nearest_loss  # nothing is kept of a fit whose losses overflow
    chain.network.to(data.target.budget.device)  # Lightning has moved the unit to the CPU
    for index, layer in enumerate(module.layers):
        quantizer = layer.weight_quantizer
        if accepted:
            codes, scale, input_scale = best.kept[index]
        else:
            codes, scale, input_scale = quantizer.nearest_codes(layer.weight), quantizer.scale, started_at[index]
        quantizer.set_codes(codes.to(layer.weight.device), scale.to(layer.weight.device))
        layer.input_quantizer.scale.data = input_scale.to(layer.weight.device)
    module.end()
    loss = best.loss if accepted else nearest_loss
    return UnitResult(unit.name, unit.blocks, steps, nearest_loss, loss, accepted, time.perf_counter() - began)


def reconstruct(
    chain: Chain,
    units: list[Unit],
    batches: Iterable[Any],
    recipe: Recipe,
    seed: int = 0,
    hardware: Hardware | None = None,
    logger: Logger | None = None,
    folder: Path | None = None,
    load: Load = lambda index: None,
    save: Save = lambda index, unit, result: None,
    show: bool = False,
    augment: Augment | None = None,
) -> list[UnitResult]:
    """Reconstruct all units in order; the network then holds hard codes and quantizes its activations.

    Args:
        chain: The prepared network with its ranges set, on the device of the computation.
        units: As `tile_units` gives them: they tile the chain.
        batches: Calibration inputs of shape (batch, ...), or pairs of inputs and labels; iterated more than once.
        recipe: What to do with each unit.
        seed: Of all random choices.
        hardware: Where the fits run.
        logger: For TensorBoard.
        folder: For the memory-mapped files of large caches.
        load: Puts the codes of a unit in place that an earlier run has finished, and gives its result.
        save: Called with every unit that is newly finished.
        show: Whether to show progress bars.
        augment: Makes further views of the calibration inputs, if the recipe wants them.

    Raises:
        UserError: The cache budget is smaller than one batch, or the disk is full.
    """
    hardware = hardware or Hardware()
    device = next(chain.network.parameters()).device
    finished = {index: result for index in range(len(units)) if (result := load(index)) is not None}
    switch(chain.layers.values(), "off", activations=False)
    progress = RunProgress(units, recipe.steps, enabled=show)
    results = []
    caches = None
    if len(finished) < len(units):
        views = Views(batches, augment, recipe.reconstruction.views, derived_seed(seed, world()[0]), device)
        caches = _Caches(chain, views, MemoryBudget(recipe.reconstruction.cache_bytes, device, folder))
    for index, unit in enumerate(units):
        progress.begin(unit)
        result = finished.get(index)
        if caches is not None:
            data = caches.open(unit)
            if result is None:
                label = f"{index:02d} {unit.name}"
                of_unit = derived_seed(seed, index, world()[0])
                result = reconstruct_unit(chain, unit, data, recipe, of_unit, hardware, logger, progress, label)
                save(index, unit, result)
            switch(chain.layers_of(unit.start, unit.stop).values(), "off", activations=False)
            caches.advance(unit)
        assert result is not None
        results.append(result)
        progress.finish(result, is_new=index not in finished)
    progress.close()
    switch(chain.layers.values(), "hard", activations=True)
    return results


class _Caches:
    """The inputs of the next unit in both networks, and its target."""

    def __init__(self, chain: Chain, views: Views, budget: MemoryBudget) -> None:
        self.chain, self.budget = chain, budget
        sizes = [len(x) for x in views]
        self.count, self.batch_size = sum(sizes), sizes[0]
        self.full = fill(budget, self.count, views, lambda x: x)
        self.quantized = self.full
        self.target: Storage | None = None

    def open(self, unit: Unit) -> PackData:
        """Compute the unit's target."""
        self.target = self._run(unit, self.full)
        return PackData(self.full, self.quantized, self.target)

    def advance(self, unit: Unit) -> None:
        """Make the unit's outputs the inputs of the next one."""
        assert self.target is not None
        with quantized(self.chain.layers_of(unit.start, unit.stop).values(), "hard"):
            output = self._run(unit, self.quantized)
        for storage in {id(s): s for s in (self.full, self.quantized)}.values():
            storage.close()
        self.full, self.quantized, self.target = self.target, output, None

    def _run(self, unit: Unit, storage: Storage) -> Storage:
        rows = storage.batches(self.batch_size)
        return fill(self.budget, self.count, rows, lambda x: self.chain.run(x, unit.start, unit.stop))
