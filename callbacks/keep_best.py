"""Keep the best iterate of a fit, judged by hard codes."""

import lightning as L

from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.snapshot import Snapshot


class KeepBest(L.Callback):
    """Measures the hardened pack at some steps and keeps what the best of them has learned.

    Args:
        data: What the pack is fitted to.
        steps: Step counts after which to measure.
    """

    def __init__(self, data: PackData, steps: set[int]) -> None:
        self.data, self.steps = data, steps
        self.loss = float("inf")
        self.kept: Snapshot | None = None

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: PackReconstruction, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure if it is time to."""
        if batch_idx + 1 not in self.steps:
            return
        loss = module.hard_loss(self.data)
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"{module.label}/hard_loss": loss}, step=batch_idx)
        if loss < self.loss:
            self.loss, self.kept = loss, Snapshot.of(module.part)
