"""From a cloud as it is stored to the points that a network sees."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.cloud import Cloud, Up
from pack_ptq.datamodules.mesh_sampling import sample_surface
from pack_ptq.datamodules.point_sampling import PointSampling, choose_points
from pack_ptq.errors import UserError, refuse

Normalize = Literal["unit_sphere", "none"]
DENSE = 4  # points drawn on a mesh for each one that farthest-point sampling keeps
TURNS = {("z", "y"): ((0, 2, 1), (1, 1, -1)), ("y", "z"): ((0, 2, 1), (1, -1, 1))}


@dataclass(frozen=True)
class PointPreparation:
    """The steps from a cloud to `num_points` points; the same cloud gives the same points every time.

    Attributes:
        num_points: Points of a sample, 1 or more.
        sampling: Which points of a larger cloud: its first ones, a random draw, or farthest-point sampling.
        sampling_seed: Of the draws, 0 to 2^32 - 1.
        normalize: Move the mean of the cloud's points to the origin and the farthest to distance 1, or leave them.
        up: Axis that the network takes for upward; clouds stored otherwise are turned.

    Raises:
        UserError: A value is out of range.
    """

    num_points: int = 1024
    sampling: PointSampling = "first"
    sampling_seed: int = 0
    normalize: Normalize = "unit_sphere"
    up: Up = "y"

    def __post_init__(self) -> None:
        if self.num_points < 1:
            raise refuse(f"{KEY}.num_points", self.num_points, "1 or more")
        if not 0 <= self.sampling_seed < 2**32:
            raise refuse(f"{KEY}.sampling_seed", self.sampling_seed, "0 to 4294967295")
        for name, allowed in (("sampling", PointSampling), ("normalize", Normalize), ("up", Up)):
            if getattr(self, name) not in get_args(allowed):
                raise refuse(f"{KEY}.{name}", getattr(self, name), ", ".join(get_args(allowed)))

    def apply(self, cloud: Cloud, index: int) -> Cloud:
        """Drop points with NaN or infinity, sample a mesh, turn upright, normalize, then choose points.

        Args:
            cloud: As it is stored.
            index: Its place in its source, from which its draws come.

        Returns:
            The cloud with points `(num_points, 3)` in float32 and the labels of these points.

        Raises:
            UserError: Nothing is left of the cloud, or it cannot be normalized; the message names it.
        """
        random = np.random.RandomState([self.sampling_seed, index])
        points, labels = self._points(cloud, random)
        if (cloud.up, self.up) in TURNS:
            axes, signs = TURNS[cloud.up, self.up]
            points = points[:, axes] * np.array(signs)
        if self.normalize == "unit_sphere":
            points = unit_sphere(points, cloud.name)
        chosen = choose_points(points, self.num_points, self.sampling, random)
        with np.errstate(over="ignore"):
            points = points[chosen].astype(np.float32)
        if not np.isfinite(points).all():
            raise UserError(f"{cloud.name} has coordinates of 3.4e38 or more; {KEY}.normalize unit_sphere scales them")
        return replace(
            cloud, points=points, part_labels=None if labels is None else labels[chosen], faces=None, up=self.up
        )

    def _points(self, cloud: Cloud, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray | None]:
        points, labels = cloud.points, cloud.part_labels
        if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "fiu":
            raise UserError(
                f"{cloud.name} has points of the shape {points.shape} in {points.dtype}; allowed: numbers (m, 3)"
            )
        points = points[:, :3].astype(np.float64)
        if cloud.faces is not None:
            dense = DENSE if self.sampling == "farthest" else 1
            try:
                return sample_surface(points, cloud.faces, dense * self.num_points, random), None
            except ValueError as error:
                raise UserError(f"{cloud.name} cannot be sampled: {error}") from error
        if labels is not None and len(labels) != len(points):
            raise UserError(f"{cloud.name} has {len(labels)} labels for {len(points)} points; allowed: one each")
        finite = np.isfinite(points).all(1)
        if not finite.any():
            raise UserError(f"{cloud.name} has {len(points)} points, none finite; allowed: 1 or more")
        return points[finite], None if labels is None else labels[finite]


def unit_sphere(points: np.ndarray, name: str) -> np.ndarray:
    """Move the mean to the origin and the farthest point to distance 1.

    Args:
        points: `(m, 3)`, finite.
        name: Of the cloud, for messages.

    Raises:
        UserError: All points are in one place.
    """
    # Squares of very large or small numbers would leave the range of floating point.
    points = points / (np.abs(points).max() or 1.0)
    points = points - points.mean(0)
    radius = np.linalg.norm(points, axis=1).max()
    if not radius > 1e-12:
        raise UserError(f"{name} has all its points in one place; allowed: an extent, or {KEY}.normalize none")
    return points / radius
