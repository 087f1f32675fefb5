"""Samples that a program already holds, for the Python interface."""

import torch
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import Metric

from pack_ptq.datamodules.base import PTQData
from pack_ptq.datamodules.classification import accuracies, check_num_scores
from pack_ptq.datamodules.samples import Source, gather
from pack_ptq.errors import UserError, refuse


class TensorData(PTQData):
    """In-memory samples for classification, already preprocessed.

    Both sources may be a tensor `(samples, ...)`, a tuple (tensor, labels), a dataset, or any iterable of batches,
    each a tensor or (tensor, labels); they are copied into memory once, in their order, here.

    Args:
        calibration: Calibration samples, not sorted by class; labels may be missing and are -1 then.
        test: Test samples with labels.
        batch_size: Samples per batch and process, 1 or more.
        num_workers: Loader processes; 0 loads in the main process.
        num_classes: Scores that the network gives, 2 or more; without it, the highest label + 1, or as many as the
            network gives once `check_output` has seen them.

    Raises:
        UserError: A source has another form or no samples, an input is NaN or infinite, a test sample has no label,
            or a label is not below `num_classes`.
    """

    def __init__(
        self,
        calibration: Source,
        test: Source,
        batch_size: int = 64,
        num_workers: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if num_classes is not None and num_classes < 2:
            raise refuse("data.num_classes", num_classes, "2 or more, or None to infer it from the labels")
        self.calibration, self.test = gather(calibration, "data.calibration"), gather(test, "data.test")
        missing = torch.nonzero(self.test.labels < 0).flatten()
        if len(missing):
            raise UserError(
                f"data.test has no labels for {len(missing)} of {len(self.test.labels)} samples,"
                f" first at index {int(missing[0])}; allowed: a label of 0 or more for each"
            )
        self.inferred = num_classes is None
        highest = int(max(self.calibration.labels.max(), self.test.labels.max()))
        self.num_classes = max(highest + 1, 2) if num_classes is None else num_classes
        if highest >= self.num_classes:
            raise refuse("data.num_classes", num_classes, f"{highest + 1} or more, since a label is {highest}")

    @property
    def calibration_key(self) -> str:
        """Argument with the calibration samples."""
        return "data.calibration"

    def calibration_dataset(self) -> Dataset:
        """Give the calibration samples in the user's order."""
        return TensorDataset(self.calibration.inputs, self.calibration.labels)

    def test_dataset(self) -> Dataset:
        """Give the test samples in the user's order."""
        return TensorDataset(self.test.inputs, self.test.labels)

    def metrics(self) -> dict[str, Metric]:
        """Give fresh accuracies: `top1`, and `top5` where there are at least 10 classes."""
        return accuracies(self.num_classes)

    def check_output(self, output: object) -> None:
        """Refuse a network that does not give one score a class.

        Where the number of classes is inferred, more scores are taken over: the samples may lack the last classes.

        Raises:
            UserError: The output is not `(batch, classes)`.
        """
        super().check_output(output)
        scores = output.shape[1]  # type: ignore[attr-defined]
        if self.inferred:
            self.num_classes = max(self.num_classes, scores)
        check_num_scores(scores, self.num_classes, "data.num_classes and the labels must fit the network")
