"""Reconstruct the units of a chain one after the other, each on what the ones before it really give."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from pack_ptq.cache import MemoryBudget, Storage, fill
from pack_ptq.callbacks.progress import RunProgress
from pack_ptq.distributed import world
from pack_ptq.fisher import fisher_weights
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import layer_rows
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.held_out import held_out_rows
from pack_ptq.modules.pack_data import PackData
from pack_ptq.reconstruct_unit import reconstruct_unit
from pack_ptq.types import Recipe, ReconstructionSpec, Unit, UnitResult
from pack_ptq.views import Views, derived_seed
from pack_ptq.workplace import Workplace

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
    boundaries = [chain.form_behind(link) for link in range(len(chain))]
    batches = [torch.empty(shape.at(batch_size), dtype=shape.dtype, device="meta") for shape in boundaries]
    batches.append(torch.empty((batch_size, *chain.input_shape), device="meta"))
    MemoryBudget(limit).check_batch(max(batches, key=lambda batch: batch.nbytes))


def check_granularity(chain: Chain, spec: ReconstructionSpec) -> None:
    """Refuse fits of single layers where the network has one that cannot be fitted alone, before any work starts.

    Raises:
        UserError: A layer is called several times, or reads no rows of samples.
    """
    if spec.granularity == "layer":
        layer_rows(chain, list(chain.layers))


def reconstruct(
    chain: Chain,
    units: list[Unit],
    batches: Iterable[Any],
    recipe: Recipe,
    place: Workplace | None = None,
    load: Load = lambda index: None,
    save: Save = lambda index, unit, result: None,
) -> list[UnitResult]:
    """Reconstruct all units in order; the network then holds hard codes and quantizes its activations.

    Samples that judge the last pass over the network, if the recipe has one, are left out.

    Args:
        chain: The prepared network with its ranges set, on the device of the computation.
        units: As `tile_units` gives them: they tile the chain.
        batches: Calibration inputs of shape (batch, ...), or pairs of inputs and labels; iterated more than once.
        recipe: What to do with each unit.
        place: Where to run.
        load: Puts the codes of a unit in place that an earlier run has finished, and gives its result.
        save: Called with every unit that is newly finished.

    Raises:
        UserError: The cache budget is smaller than one batch, the disk is full, a layer cannot be fitted as the recipe
            wants it, or the loss `fisher` finds no finite gradient.
    """
    check_granularity(chain, recipe.reconstruction)
    device = next(chain.network.parameters()).device
    finished = {index: result for index in range(len(units)) if (result := load(index)) is not None}
    switch(chain.operations, "off", activations=False)
    place = place or Workplace()
    progress = RunProgress(units, recipe.steps, enabled=place.show)
    results = []
    caches = None
    if len(finished) < len(units):
        budget = MemoryBudget(recipe.reconstruction.cache_bytes, device, place.folder)
        # What judges the last pass must be new to the codes, or it would find them better than they are.
        sizes = Views(batches).sizes()
        held_out = held_out_rows(recipe, sum(sizes), place.seed)
        views = Views(batches, device, left_out=held_out.tolist())
        caches = _Caches(chain, views, sum(sizes) - len(held_out), sizes[0], budget)
    for index, unit in enumerate(units):
        progress.begin(unit)
        result = finished.get(index)
        if caches is not None:
            data = caches.open(unit, weighted=result is None and recipe.reconstruction.loss == "fisher")
            if result is None:
                label = f"{index:02d} {unit.name}"
                of_unit = derived_seed(place.seed, index, world()[0])
                own = replace(place, seed=of_unit, callbacks=(*place.callbacks, progress))
                result = reconstruct_unit(chain, unit, data, recipe, own, label)
                save(index, unit, result)
            switch(chain.operations_of(unit.start, unit.stop), "off", activations=False)
            caches.advance(unit)
        assert result is not None
        results.append(result)
        progress.finish(result, is_new=index not in finished)
    progress.close()
    switch(chain.operations, "hard", activations=True)
    return results


class _Caches:
    """The inputs of the next unit in both networks, its target, and the weights of its error if there are any."""

    def __init__(self, chain: Chain, views: Views, count: int, batch_size: int, budget: MemoryBudget) -> None:
        self.chain, self.budget, self.count, self.batch_size = chain, budget, count, batch_size
        self.full = fill(budget, self.count, views, lambda x: x)
        self.quantized = self.full
        self.target: Storage | None = None
        self.weight: Storage | None = None

    def open(self, unit: Unit, weighted: bool) -> PackData:
        """Compute the unit's target, and the weights by its Fisher information."""
        self.target = self._run(unit, self.full)
        self.weight = fisher_weights(self.chain, unit, self.full, self.batch_size) if weighted else None
        return PackData(self.full, self.quantized, self.target, self.weight)

    def advance(self, unit: Unit) -> None:
        """Make the unit's outputs the inputs of the next one."""
        assert self.target is not None
        if self.weight is not None:
            self.weight.close()
        with quantized(self.chain.operations_of(unit.start, unit.stop), "hard"):
            output = self._run(unit, self.quantized)
        for storage in {id(s): s for s in (self.full, self.quantized)}.values():
            storage.close()
        self.full, self.quantized, self.target = self.target, output, None

    def _run(self, unit: Unit, storage: Storage) -> Storage:
        rows = storage.batches(self.batch_size)
        return fill(self.budget, self.count, rows, lambda x: self.chain.run(x, unit.start, unit.stop))
