"""Show the last pass over the whole network in TensorBoard."""

from typing import Any

import lightning as L

from pack_ptq.modules.tuning import NetworkTuning


class TuningMonitor(L.Callback):
    """Writes the divergence from the full-precision outputs that are fitted to, `KL(p_fp || p_q)` in nats.

    Args:
        every_n_steps: Distance of the points, 1 or more.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: NetworkTuning, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show where the pass stands."""
        if trainer.logger is not None and (batch_idx % self.every_n_steps == 0 or batch_idx + 1 == module.steps):
            step = module.earlier_steps + batch_idx
            trainer.logger.log_metrics({"tuning/divergence": float(outputs["divergence"])}, step=step)
