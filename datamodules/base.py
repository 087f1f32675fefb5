"""What every source of samples shares: batches for calibration and test, sharded exactly over the processes."""

import hashlib
from abc import ABC, abstractmethod

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics import Metric

from pack_ptq.digests import tensor_bytes
from pack_ptq.errors import UserError, refuse
from pack_ptq.types import Preprocessing

KEY = "data.init_args"


class PTQData(L.LightningDataModule, ABC):
    """Samples for calibration and labelled samples for the test.

    A new dataset is a subclass with two methods and a metric: `calibration_dataset`, `test_dataset`, `metrics`.
    Items are `(input, label)` pairs; calibration items may carry any label, for it is read by the task loss only.
    `validate` runs over the calibration samples, `test` over the test samples.

    Args:
        batch_size: Samples per batch and process, 1 or more.
        num_workers: Loader processes; 0 loads in the main process.

    Raises:
        UserError: `batch_size` is below 1 or `num_workers` below 0.
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise refuse(f"{KEY}.batch_size", batch_size, "1 or more")
        if num_workers < 0:
            raise refuse(f"{KEY}.num_workers", num_workers, "0 or more")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.rank, self.world_size = 0, 1

    @abstractmethod
    def calibration_dataset(self) -> Dataset:
        """Give the calibration samples as `(input, label)` pairs, in a fixed order.

        It should not follow the classes: the first samples alone serve corrections of biases, the measurements of mixed
        precision, and the choice of what a fit keeps.
        """

    @abstractmethod
    def test_dataset(self) -> Dataset:
        """Give the test samples as `(input, label)` pairs."""

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Give fresh metrics by their name in the report, each with values in [0, 1]."""

    @property
    def calibration_key(self) -> str:
        """Key by which the user gets more calibration samples, for messages."""
        return "data"

    def check(self) -> None:
        """Refuse samples that cannot serve, before any work starts; called after `use_preprocessing`.

        A subclass with files to verify adds its own checks to these.

        Raises:
            UserError: The calibration samples do not fill one batch, or there are no test samples.
        """
        samples = len(self.calibration_dataset())  # type: ignore[arg-type]
        if samples < self.batch_size:
            allowed = f"1 to {samples}, the number of calibration samples" if samples else "no size without samples"
            raise refuse(f"{KEY}.batch_size", self.batch_size, f"{allowed} (see {self.calibration_key})")
        if not len(self.test_dataset()):  # type: ignore[arg-type]
            raise UserError("data has 0 test samples; allowed: 1 or more")

    def task_loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Compute the labelled loss, one number per sample; cross-entropy unless overridden."""
        return F.cross_entropy(output, label, reduction="none")

    def check_output(self, output: object) -> None:
        """Refuse a network whose output does not fit this task; classification scores `(batch, classes)` here.

        All losses take an output with three axes for `(batch, points, classes)`, and any other for `(batch, classes,
        ...)`: an override must refuse a network that has them otherwise.

        Raises:
            UserError: The output has another form.
        """
        if not isinstance(output, Tensor) or output.ndim != 2:
            form = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"the network's output is {form}; allowed for classification: one tensor (batch, classes)")

    @property
    def augments(self) -> bool:
        """Whether `augment` gives anything but its input; a subclass that overrides one overrides both."""
        return False

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Change calibration inputs at random, as this kind of data allows, for recipes that take several views.

        Args:
            inputs: A batch as `calibration_dataset` gives it, on the CPU.
            generator: Source of every choice.
        """
        return inputs

    def use_preprocessing(self, preprocessing: Preprocessing | None) -> None:
        """Take the network's own wishes for its input; what the user set goes before them."""

    def fingerprint(self) -> str:
        """Give a digest of all samples and labels, by which a run folder knows its data."""
        digests = []
        for dataset in (self.calibration_dataset(), self.test_dataset()):
            found, forms = (hashlib.sha256(), hashlib.sha256()), set()
            for batch in DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers):
                for digest, part in zip(found, batch, strict=True):
                    is_tensor = isinstance(part, Tensor)
                    forms.add(f"{tuple(part.shape[1:])} {part.dtype}" if is_tensor else type(part).__name__)
                    digest.update(tensor_bytes(part) if is_tensor else repr(part).encode())
            digests += [*(digest.hexdigest() for digest in found), *sorted(forms)]
        return hashlib.sha256(repr(digests).encode()).hexdigest()

    def setup(self, stage: str) -> None:
        """Take this process's share when Lightning has started the processes."""
        if self.trainer is not None:
            self.shard(self.trainer.global_rank, self.trainer.world_size)

    def shard(self, rank: int, world_size: int) -> None:
        """Give this process every `world_size`-th sample from `rank` on, so that none counts twice."""
        self.rank, self.world_size = rank, world_size

    def _loader(self, dataset: Dataset) -> DataLoader:
        size = len(dataset)  # type: ignore[arg-type]
        if self.world_size > 1:
            dataset = Subset(dataset, range(self.rank, size, self.world_size))
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )

    def val_dataloader(self) -> DataLoader:
        """Batches of the calibration samples, the last partial one too."""
        return self._loader(self.calibration_dataset())

    def test_dataloader(self) -> DataLoader:
        """Batches of the test samples, the last partial one too."""
        return self._loader(self.test_dataset())
