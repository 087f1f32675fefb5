"""Keep the best iterate of a fit, judged by hard codes."""

import lightning as L

from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.modules.tuning import Learned, NetworkTuning
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


class KeepBestTuning(L.Callback):
    """Measures the whole network on held-out samples at some steps and keeps the best scales and biases.

    Args:
        data: Inputs and full-precision outputs.
        held_out: Rows of samples that the tuning does not see.
        steps: Step counts after which to measure, besides the start.
    """

    def __init__(self, data: PackData, held_out: slice, steps: set[int]) -> None:
        self.data, self.held_out, self.steps = data, held_out, steps
        self.before = self.best = float("inf")
        self.kept: Learned = ([], [])

    def begin(self, module: NetworkTuning) -> None:
        """Measure and keep what there is before the first step."""
        self.before = self.best = module.divergence(self.data, self.held_out)
        self.kept = module.learned()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: NetworkTuning, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure if it is time to."""
        if batch_idx + 1 not in self.steps:
            return
        divergence = module.divergence(self.data, self.held_out)
        if trainer.logger is not None:
            trainer.logger.log_metrics({"tuning/held_out_divergence": divergence}, step=batch_idx)
        # A rate beyond reason may lead a scale to 0 or below.
        sound = all(bool(quantizer.scale > 0) for quantizer in module.quantizers)
        if divergence < self.best and sound:
            self.best, self.kept = divergence, module.learned()
