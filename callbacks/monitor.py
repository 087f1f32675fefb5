"""Show the fit of a pack in TensorBoard."""

from typing import Any

import lightning as L
import torch

from pack_ptq.modules.reconstruction import PackReconstruction


class ReconstructionMonitor(L.Callback):
    """Writes losses, penalty, share of settled roundings and learned scales of a pack, and its weights' histograms.

    Args:
        every_n_steps: Distance of the points, 1 or more.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_fit_start(self, trainer: L.Trainer, module: PackReconstruction) -> None:  # type: ignore[override]
        """Show the weights before the fit."""
        self._histograms(trainer, module, "before")

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: PackReconstruction, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show where the fit stands."""
        if trainer.logger is None or (batch_idx % self.every_n_steps and batch_idx + 1 != module.steps):
            return
        penalty = float(module.last_penalty)
        values = {
            "loss": float(outputs["loss"]) - penalty,
            "penalty": penalty,
            "settled": module.settled_share(),
        }
        values |= {f"activation_scale/{i}": float(scale.detach()) for i, scale in enumerate(module.activation_scales)}
        trainer.logger.log_metrics({f"{module.label}/{k}": v for k, v in values.items()}, step=batch_idx)

    def on_fit_end(self, trainer: L.Trainer, module: PackReconstruction) -> None:  # type: ignore[override]
        """Show the weights after the fit."""
        self._histograms(trainer, module, "after")

    @torch.no_grad()
    def _histograms(self, trainer: L.Trainer, module: PackReconstruction, when: str) -> None:
        if trainer.logger is None or not trainer.is_global_zero:
            return
        for path, layer in module.part.layers.items():
            weight = layer.weight if when == "before" else layer.weight_quantizer(layer.weight)
            trainer.logger.experiment.add_histogram(f"weights_{when}/{path}", weight.cpu(), 0)  # type: ignore[attr-defined]
