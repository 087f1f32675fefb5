"""Tune scales and biases of the whole network when all its units have their codes."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from pack_ptq.cache import MemoryBudget, Storage, fill
from pack_ptq.callbacks.progress import StepProgress
from pack_ptq.callbacks.tuning_monitor import TuningMonitor
from pack_ptq.distributed import world
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.modules.reconstruction import PackData, loader
from pack_ptq.modules.tuning import NetworkTuning
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Hardware, Recipe, TuningResult
from pack_ptq.views import Augment, Views, derived_seed


def tune(
    chain: Chain,
    batches: Iterable[Any],
    recipe: Recipe,
    seed: int = 0,
    hardware: Hardware | None = None,
    logger: Logger | None = None,
    folder: Path | None = None,
    show: bool = False,
    augment: Augment | None = None,
) -> TuningResult:
    """Fit scales and biases to the network's own full-precision outputs, and keep them if the outputs come closer.

    Args:
        chain: The network with hard codes and its biases still in full precision.
        batches: Calibration inputs of shape (batch, ...), or pairs of inputs and labels; iterated more than once.
        recipe: Settings and number of steps.
        seed: Of all random choices.
        hardware: Where the fit runs.
        logger: For TensorBoard.
        folder: For the memory-mapped files of large caches.
        show: Whether to show a progress bar.
        augment: Makes further views of the calibration inputs, if the recipe wants them.
    """
    began = time.perf_counter()
    steps, spec = recipe.tuning_steps, recipe.tuning
    device = next(chain.network.parameters()).device
    of_process = derived_seed(seed, "tuning", world()[0])
    views = Views(batches, augment, recipe.reconstruction.views, of_process, device)
    data = _outputs(chain, views, MemoryBudget(recipe.reconstruction.cache_bytes, device, folder))
    before_tuning = [_learned(layer) for layer in chain.layers.values()]
    module = NetworkTuning(chain, spec, steps)
    before = module.divergence(data)
    progress = StepProgress("tuning", steps, enabled=show)
    trainer = make_trainer(hardware or Hardware(), [TuningMonitor(), progress], logger, max_steps=steps)
    trainer.fit(module, loader(data, spec.batch_size, steps, of_process))
    chain.network.to(device)  # Lightning has moved it to the CPU
    module.end()
    after = module.divergence(data)
    accepted = after <= before
    if not accepted:
        for layer, (scale, input_scale, bias) in zip(chain.layers.values(), before_tuning, strict=True):
            layer.weight_quantizer.scale, layer.input_quantizer.scale.data = scale, input_scale
            if bias is not None:
                layer.layer.bias.data = bias  # type: ignore[union-attr]
    return TuningResult(steps, before, after if accepted else before, accepted, time.perf_counter() - began)


def _learned(layer: Any) -> tuple:
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return layer.weight_quantizer.scale.clone(), layer.input_quantizer.scale.detach().clone(), bias


@torch.no_grad()
def _outputs(chain: Chain, views: Views, budget: MemoryBudget) -> PackData:
    """Cache the inputs of all views and what the full-precision network gives for them."""
    switch(chain.layers.values(), "off", activations=False)
    sizes = [len(x) for x in views]
    inputs: Storage = fill(budget, sum(sizes), views, lambda x: x)
    outputs = fill(budget, sum(sizes), inputs.batches(sizes[0]), chain.network)
    switch(chain.layers.values(), "hard", activations=True)
    return PackData(inputs, inputs, outputs)
