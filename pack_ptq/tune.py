"""Tune scales and biases of the whole network when all its units have their codes."""

import time
from collections.abc import Iterable
from typing import Any

import torch

from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.callbacks.keep_best_tuning import KeepBestTuning
from pack_ptq.callbacks.progress import StepProgress
from pack_ptq.callbacks.tuning_monitor import TuningMonitor
from pack_ptq.distributed import world
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.held_out import held_out_rows
from pack_ptq.modules.random_batches import RandomBatches
from pack_ptq.modules.tuning import NetworkData, NetworkTuning, averaged_over_views, check_tuning
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Recipe, TuningResult, TuningSpec
from pack_ptq.views import Augment, Views, derived_seed
from pack_ptq.workplace import Workplace

LIMITING_BATCHES = 4  # whose ratios of loss and promise differ by a fifth or so


def tune(
    chain: Chain,
    batches: Iterable[Any],
    recipe: Recipe,
    place: Workplace | None = None,
    augment: Augment | None = None,
) -> TuningResult:
    """Fit scales and biases to the network's own full-precision outputs; held-out samples judge what is kept.

    Args:
        chain: The network with hard codes and its biases still in full precision, on the device of the computation.
        batches: Calibration inputs of shape (batch, ...), or pairs of inputs and labels; iterated more than once.
        recipe: Settings and number of steps.
        place: Where to run.
        augment: Makes further views of the calibration inputs, if the recipe wants them.

    Raises:
        UserError: There is nothing to tune, or a single sample; or the cache budget or the disk is too small.
    """
    began, place = time.perf_counter(), place or Workplace()
    steps, spec = recipe.tuning_steps, recipe.tuning
    device = next(chain.network.parameters()).device
    of_process = derived_seed(place.seed, "tuning", world()[0])
    sizes = Views(batches).sizes()
    samples = sum(sizes)
    check_tuning(chain, recipe, samples)
    count = min(spec.views, max(1, round(steps * spec.batch_size / samples)))
    views = Views(batches, device, augment, count, of_process)
    budget = MemoryBudget(recipe.reconstruction.cache_bytes, device, place.folder)
    data = _outputs(chain, views, samples * views.count, sizes[0], budget, spec)
    held_out = held_out_rows(recipe, samples, place.seed)
    rows = torch.arange(len(data.target))
    seen = rows[~torch.isin(rows % samples, held_out)]  # every view of a held-out sample is held out
    best = KeepBestTuning(data, held_out)
    fast = NetworkTuning(chain, spec, steps, recipe.weight.bits)
    best.begin(fast)
    fast.limit_rates(RandomBatches(data, spec.batch_size, min(LIMITING_BATCHES, steps), of_process, seen))
    shares = [share * fast.rate_share for share in (1.0, spec.slow_share) if share > 0]
    for index, share in enumerate(shares):
        module = NetworkTuning(chain, spec, steps, recipe.weight.bits, share, index * steps)
        callbacks = [best, TuningMonitor(), StepProgress("tuning", steps, enabled=place.show), *place.callbacks]
        trainer = make_trainer(place.hardware, callbacks, place.logger, max_steps=steps)
        trainer.fit(module, RandomBatches(data, spec.batch_size, steps, of_process, seen).loader())
        chain.network.to(device)  # Lightning has moved it to the CPU
        module.end(best.start.learned)
    kept = best.chosen()
    module.end(kept.learned)
    data.close()  # which Lightning's Trainer and its module, tied to each other, would hold for a while
    accepted, took = kept is not best.start, time.perf_counter() - began
    share = kept.rate_share if accepted else shares[0]
    return TuningResult(len(shares) * steps, best.start.mean, kept.mean, accepted, took, share)


@torch.no_grad()
def _outputs(
    chain: Chain, views: Views, rows: int, batch_size: int, budget: MemoryBudget, spec: TuningSpec
) -> NetworkData:
    """Cache the inputs of all views and what the full-precision network gives for them."""
    switch(chain.operations, "off", activations=False)
    last, end = len(chain) - 1, len(chain)
    inputs = fill(budget, rows, views, lambda x: x)
    features = wanted = None
    if spec.feature_weight > 0 and last:
        features = fill(budget, rows, inputs.batches(batch_size), lambda x: chain.run(x, 0, last))
        outputs = fill(budget, rows, features.batches(batch_size), lambda x: chain.run(x, last, end))
    else:
        outputs = fill(budget, rows, inputs.batches(batch_size), chain.network)
    # Where there are places, they move with the view.
    if spec.average_views and views.count > 1 and outputs.tensor.ndim == 2:
        means = averaged_over_views(outputs.rows(slice(None)), views.count)
        wanted = fill(budget, rows, means.split(batch_size), lambda x: x)
    switch(chain.operations, "hard", activations=True)
    return NetworkData(inputs, inputs, outputs, wanted=wanted, features=features)
