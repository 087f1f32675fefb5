"""Measure the task's metrics on the whole test set."""

from typing import Any

import lightning as L
import torch
from torchmetrics import MetricCollection

from pack_ptq.distributed import all_reduce


class Evaluation(L.Callback):
    """Runs the datamodule's metrics under `test`; the results are in `values` (percent) and `num_samples`."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.num_samples = 0
        self._metrics: MetricCollection | None = None

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin with fresh metrics."""
        self._metrics = MetricCollection(trainer.datamodule.metrics()).to(module.device)  # type: ignore[attr-defined]
        self.num_samples = 0

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch."""
        assert self._metrics is not None
        self._metrics.update(outputs, batch[1])
        self.num_samples += len(outputs)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Merge over the processes; their shares are disjoint, so counts are exact."""
        assert self._metrics is not None
        self.values = {name: 100 * float(value) for name, value in self._metrics.compute().items()}
        self.num_samples = int(all_reduce(torch.tensor(self.num_samples)))
        self._metrics = None
