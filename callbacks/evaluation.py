"""Measure the task's metrics on the whole test set, and how near the outputs are to full precision."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from pack_ptq.distributed import all_reduce
from pack_ptq.losses import kl_from_full_precision, same_class
from pack_ptq.modules.network import WholeNetwork


class Evaluation(L.Callback):
    """Runs the datamodule's metrics under `test`.

    Attributes:
        values: The metrics in percent.
        num_samples: Test samples of all processes.
        fidelity: Beside the module's reference, `agreement`, the percentage of samples (or points) that get the same
            class, and `kl`, the mean `KL(p_fp || p_q)` in nats; empty where it has none.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.fidelity: dict[str, float] = {}
        self.num_samples = 0
        self._metrics: MetricCollection | None = None
        self._agreement, self._divergence = MeanMetric(), MeanMetric()

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin with fresh metrics."""
        self._metrics = MetricCollection(trainer.datamodule.metrics()).to(module.device)  # type: ignore[attr-defined]
        self._agreement, self._divergence = MeanMetric().to(module.device), MeanMetric().to(module.device)
        self.num_samples = 0

    def on_test_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        module: WholeNetwork,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch."""
        assert self._metrics is not None
        self._metrics.update(outputs, batch[1])
        self.num_samples += len(outputs)
        if module.reference is not None:
            self._compare(outputs, module.reference(batch[0]))

    def _compare(self, outputs: Tensor, expected: Tensor) -> None:
        self._divergence.update(kl_from_full_precision(outputs.double(), expected.double()))
        self._agreement.update(same_class(outputs, expected))

    def on_test_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Merge over the processes; their shares are disjoint, so counts are exact."""
        assert self._metrics is not None
        self.values = {name: 100 * float(value) for name, value in self._metrics.compute().items()}
        self.num_samples = int(all_reduce(torch.tensor(self.num_samples)))
        self.fidelity = {}
        if module.reference is not None:
            agreement, divergence = float(self._agreement.compute()), float(self._divergence.compute())
            self.fidelity = {"agreement": 100 * agreement, "kl": divergence}
        self._metrics = None
