"""The embedded default for point clouds: solids made up from a seed, without a download."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.point_clouds import PointCloudData
from pack_ptq.datamodules.point_labels import ClassLabels, PartLabels, PointLabels
from pack_ptq.datamodules.point_preparation import unit_sphere
from pack_ptq.datamodules.solid_classes import SOLIDS
from pack_ptq.datamodules.solid_surfaces import Random, Surface
from pack_ptq.errors import refuse

NAMES = list(SOLIDS)
PARTS = {name: parts for name, (parts, _) in SOLIDS.items()}
FIRST_PART = dict(zip(NAMES, np.cumsum([0, *PARTS.values()]).tolist(), strict=False))
TRAIN_PER_CLASS, TEST_PER_CLASS = 100, 30
TRAIN_SIZE, TEST_SIZE = TRAIN_PER_CLASS * len(NAMES), TEST_PER_CLASS * len(NAMES)
POINTS = 1024
SEEDS = {"train": 40, "test": 41}
STRETCH = 0.45  # each axis is scaled by up to this share either way
TILT = np.pi / 6
NOISE = 0.06  # of the radius


@lru_cache(maxsize=2)
def solids(split: Literal["train", "test"]) -> tuple[Cloud, ...]:
    """Give the solids of a split, class after class, with their parts; no user's seed changes them.

    Returns:
        2000 clouds to train or 600 to test, 1024 points each in random order, about 1 in radius, y up.
    """
    # RandomState, unlike newer generators, promises the same stream in every numpy version; the weights rely on it.
    count = TRAIN_PER_CLASS if split == "train" else TEST_PER_CLASS
    return tuple(
        _cloud(name, f"{split} solid {name} {index}", Random([SEEDS[split], label, index]))
        for label, name in enumerate(NAMES)
        for index in range(count)
    )


def _cloud(kind: str, name: str, random: Random) -> Cloud:
    points, parts = _draw(SOLIDS[kind][1](random), random)
    points = unit_sphere(points * random.uniform(1 - STRETCH, 1 + STRETCH, 3), name) @ _pose(random)
    points = random.uniform(0.8, 1.25) * (points + NOISE * random.standard_normal(points.shape))
    return Cloud(name, points.astype(np.float32), NAMES.index(kind), parts + FIRST_PART[kind])


def _draw(surfaces: list[Surface], random: Random) -> tuple[np.ndarray, np.ndarray]:
    bounds = np.cumsum([surface.area for surface in surfaces])
    owners = np.searchsorted(bounds / bounds[-1], random.random_sample(POINTS), "right").clip(max=len(surfaces) - 1)
    points = np.empty((POINTS, 3))
    for place, surface in enumerate(surfaces):
        mine = owners == place
        points[mine] = surface.draw(int(mine.sum()), random)
    return points, np.array([surface.part for surface in surfaces])[owners]


def _pose(random: Random) -> np.ndarray:
    """Give a rotation for points as rows: any turn about y, then a small tilt about x and z."""
    turn, (over, aside) = random.uniform(0, 2 * np.pi), random.uniform(-TILT, TILT, 2)
    return _rotation(turn, 2, 0) @ _rotation(over, 1, 2) @ _rotation(aside, 0, 1)


def _rotation(angle: float, first: int, second: int) -> np.ndarray:
    rotation = np.eye(3)
    rotation[first, first] = rotation[second, second] = np.cos(angle)
    rotation[first, second], rotation[second, first] = np.sin(angle), -np.sin(angle)
    return rotation


@dataclass(eq=False)
class SolidsData(PointCloudData):
    """Embedded solids in 20 classes, such as cone, mug and chair, in random pose, proportions and noise.

    Of 1024 points each, 2000 calibrate and 600 test.

    Attributes:
        task: `classification`, with a class each, or `parts`, with a part for every point and the class one-hot.
        augment_rotation: Largest turn of a further view about the upward axis, in degrees, 0 to 180.

    Raises:
        UserError: A value is out of range.
    """

    task: Literal["classification", "parts"] = "classification"
    _: KW_ONLY
    augment_rotation: float = 180.0

    def __post_init__(self) -> None:
        if self.task not in ("classification", "parts"):
            raise refuse(f"{KEY}.task", self.task, "classification, parts")
        if not 1 <= self.num_points <= POINTS:
            raise refuse(f"{KEY}.num_points", self.num_points, f"1 to {POINTS}")
        if self.num_calibration is not None and not 1 <= self.num_calibration <= TRAIN_SIZE:
            raise refuse(f"{KEY}.num_calibration", self.num_calibration, f"1 to {TRAIN_SIZE}, or null for all")
        super().__post_init__()

    def calibration_clouds(self) -> Sequence[Cloud]:
        """Give the training split."""
        return solids("train")

    def test_clouds(self) -> Sequence[Cloud]:
        """Give the test split."""
        return solids("test")

    @cached_property
    def labels(self) -> PointLabels:  # type: ignore[override]
        """The classes, or their parts."""
        return ClassLabels(NAMES) if self.task == "classification" else PartLabels(PARTS)
