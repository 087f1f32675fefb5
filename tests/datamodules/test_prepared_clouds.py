"""Clouds prepared by any number of processes, and messages for those that cannot serve."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.point_labels import ClassLabels, PartLabels
from pack_ptq.datamodules.point_preparation import PointPreparation
from pack_ptq.datamodules.prepared_clouds import PreparedClouds, prepare_clouds
from pack_ptq.errors import UserError

POINTS = np.random.RandomState(0).standard_normal((6, 10, 3))
PREPARATION = PointPreparation(num_points=10, normalize="none")


class Source(Sequence[Cloud]):
    """Six clouds, of which the second cannot be read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Cloud:  # type: ignore[override]
        if index == 1:
            raise UserError("b.ply cannot be read")
        return Cloud(f"cloud {index}", POINTS[index], index % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_messages(workers: int) -> None:
    labels = ClassLabels(["bolt", "nut"])
    clouds, failures = prepare_clouds(Source(), [4, 1, 2, 3, 0], PREPARATION, labels, True, workers)
    assert [cloud.name for cloud in clouds] == ["cloud 4", "cloud 3", "cloud 0"]
    assert failures == ["b.ply cannot be read", "cloud 2 has the label 2; allowed: 0 to 1"]


def test_samples_of_classes_and_parts() -> None:
    clouds = [Cloud(str(i), points.astype(np.float32), i % 2, np.full(10, i % 2)) for i, points in enumerate(POINTS)]
    classes, parts = (
        PreparedClouds(clouds, ClassLabels(["a", "b"])),
        PreparedClouds(clouds, PartLabels({"a": 1, "b": 1})),
    )
    assert len(classes) == len(parts) == 6
    points, label = classes[3]
    assert (tuple(points.shape), points.dtype, label) == ((10, 3), torch.float32, 1)
    points, label = parts[3]
    assert tuple(points.shape) == (10, 5)
    assert isinstance(label, torch.Tensor)
    assert (label.dtype, label.tolist()) == (torch.int64, [1] * 10)
