"""What labels of point clouds mean: a class each, or a part for every point."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.classification import check_num_scores
from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.mean_class_accuracy import MeanClassAccuracy
from pack_ptq.datamodules.part_iou import PartIoU
from pack_ptq.datamodules.samples import UNLABELLED
from pack_ptq.errors import UserError, refuse

REMEDY = "model and data must have the same classes"


class PointLabels(ABC):
    """What a kind of labels asks of clouds and networks.

    Args:
        names: Of the classes or categories, in label order, 1 or more.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def check(self, cloud: Cloud, needs_label: bool) -> None:
        """Refuse a cloud whose labels are missing or out of range.

        Raises:
            UserError: The message names the cloud.
        """
        if not (0 if needs_label else UNLABELLED) <= cloud.label < len(self.names):
            raise UserError(f"{cloud.name} has the label {cloud.label}; allowed: 0 to {len(self.names) - 1}")

    @abstractmethod
    def sample(self, points: Tensor, label: int, part_labels: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Make a pair for the network from points `(n, 3)`, their class, and their parts `(n,)`."""

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Give fresh metrics by their name in the report."""

    @abstractmethod
    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Give one loss per cloud."""

    @abstractmethod
    def check_output(self, output: object, num_points: int) -> None:
        """Refuse a network whose output does not fit.

        Raises:
            UserError: The message gives both shapes.
        """


class ClassLabels(PointLabels):
    """One class a cloud: points `(n, 3)` and an integer; overall and mean-class accuracy."""

    def sample(self, points: Tensor, label: int, part_labels: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Give the points and their class."""
        return points, label

    def metrics(self) -> dict[str, Metric]:
        """Give fresh accuracies over samples and over classes."""
        classes = len(self.names)
        return {"overall": MulticlassAccuracy(classes, average="micro"), "mean_class": MeanClassAccuracy(classes)}

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Give the cross-entropy of every cloud."""
        return F.cross_entropy(output, label, reduction="none")

    def check_output(self, output: object, num_points: int) -> None:
        """Refuse anything but scores `(batch, classes)`."""
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UserError(f"the network's output is {_form(output)}; allowed for classification: (batch, classes)")
        check_num_scores(output.shape[1], len(self.names), REMEDY)


class PartLabels(PointLabels):
    """A part for every point: points `(n, 3 + categories)` with the category one-hot, and parts `(n,)` in int64.

    Args:
        parts: Number of parts of each category, in label order; parts are numbered from 0 on through all of them.
    """

    def __init__(self, parts: Mapping[str, int]) -> None:
        super().__init__(list(parts))
        self.counts = list(parts.values())
        self.stops = list(accumulate(self.counts))

    def check(self, cloud: Cloud, needs_label: bool) -> None:
        """Refuse a cloud without a category, or with a point whose part is not the category's."""
        super().check(cloud, needs_label=True)
        if cloud.part_labels is None:
            raise UserError(f"{cloud.name} has no labels of its points; allowed: a part for each")
        first, stop = self.stops[cloud.label] - self.counts[cloud.label], self.stops[cloud.label]
        wrong = cloud.part_labels[~np.isin(cloud.part_labels, np.arange(first, stop))]
        if wrong.size:
            raise UserError(
                f"{cloud.name} has the part {wrong[0]:g}; allowed for {self.names[cloud.label]}: {first} to {stop - 1}"
            )

    def sample(self, points: Tensor, label: int, part_labels: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Give the points with their category, and their parts."""
        assert part_labels is not None
        category = F.one_hot(torch.tensor(label), len(self.names)).to(points.dtype)
        return torch.cat([points, category.expand(len(points), -1)], 1), part_labels

    def metrics(self) -> dict[str, Metric]:
        """Give fresh mIoUs over shapes and over categories."""
        return {"instance_miou": PartIoU(self.counts, "instance"), "class_miou": PartIoU(self.counts, "class")}

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Give the mean cross-entropy over the points of every cloud."""
        return F.cross_entropy(output.transpose(1, 2), label, reduction="none").mean(1)

    def check_output(self, output: object, num_points: int) -> None:
        """Refuse anything but scores `(batch, n, parts)`, by which all losses and metrics know points from parts."""
        parts = self.stops[-1]
        if not isinstance(output, Tensor) or output.ndim != 3 or tuple(output.shape[1:]) != (num_points, parts):
            is_turned = isinstance(output, Tensor) and tuple(output.shape[1:]) == (parts, num_points)
            remedy = "; `transpose(1, 2)` at the end of its forward pass gives that" if is_turned else ""
            allowed = f"(batch, points, parts), which is (batch, {num_points}, {parts})"
            raise UserError(f"the network's output is {_form(output)}; allowed for parts: {allowed}{remedy}")
        if num_points == parts:
            raise refuse(f"{KEY}.num_points", num_points, f"any but {parts}, the number of parts, to tell them apart")


def _form(output: object) -> object:
    return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
