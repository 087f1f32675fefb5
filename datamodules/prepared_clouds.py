"""Clouds prepared once and kept in memory, and those that cannot serve."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.point_labels import PointLabels
from pack_ptq.datamodules.point_preparation import PointPreparation
from pack_ptq.errors import UserError


class PreparedClouds(Dataset):
    """Samples as the network takes them.

    Args:
        clouds: Prepared, all with the same number of points.
        labels: What their labels mean.
    """

    def __init__(self, clouds: Sequence[Cloud], labels: PointLabels) -> None:
        self.points = torch.from_numpy(np.stack([cloud.points for cloud in clouds]))
        self.classes = [cloud.label for cloud in clouds]
        parts = [cloud.part_labels for cloud in clouds if cloud.part_labels is not None]
        self.parts = torch.from_numpy(np.stack(parts).astype(np.int64)) if len(parts) == len(clouds) else None
        self.labels = labels

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        """Give the input and what is known of it."""
        parts = None if self.parts is None else self.parts[index]
        return self.labels.sample(self.points[index], self.classes[index], parts)


class _Attempts(Dataset):
    def __init__(
        self, source: Sequence[Cloud], preparation: PointPreparation, labels: PointLabels, needs_label: bool
    ) -> None:
        self.source, self.preparation, self.labels, self.needs_label = source, preparation, labels, needs_label

    def __getitem__(self, index: int) -> Cloud | str:
        # A refusal is given back, for an error of a loader process would come with its traceback as the message.
        try:
            cloud = self.source[index]
            self.labels.check(cloud, self.needs_label)
            return self.preparation.apply(cloud, index)
        except UserError as error:
            return str(error)


def prepare_clouds(
    source: Sequence[Cloud],
    indices: Sequence[int],
    preparation: PointPreparation,
    labels: PointLabels,
    needs_label: bool,
    num_workers: int = 0,
) -> tuple[list[Cloud], list[str]]:
    """Read, check and prepare clouds.

    Args:
        source: Clouds as they are stored.
        indices: Which of them, in the order of the samples.
        preparation: The steps.
        labels: What labels are allowed.
        needs_label: Refuse clouds without a label.
        num_workers: Processes that prepare; 0 prepares in the main process.

    Returns:
        Those prepared, in their order, and a message for each that cannot serve.
    """
    attempts = _Attempts(source, preparation, labels, needs_label)
    # With a generator of its own, since a loader draws from the global one.
    loader: DataLoader = DataLoader(
        attempts,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    results = list(loader)
    return [r for r in results if isinstance(r, Cloud)], [r for r in results if isinstance(r, str)]


def _as_it_is(result: Cloud | str) -> Cloud | str:
    return result
