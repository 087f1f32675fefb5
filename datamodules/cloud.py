"""A point cloud as its source gives it, and sequences of them that read when asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from pack_ptq.datamodules.samples import UNLABELLED
from pack_ptq.errors import UserError

Up: TypeAlias = Literal["y", "z"]


@dataclass(frozen=True)
class Cloud:
    """A point cloud, or a mesh whose surface is still to be sampled.

    Attributes:
        name: What messages call it: its file, or its place in one.
        points: `(m, 3 or more)`, of which the first three columns are x, y, z in any unit; vertices of a mesh.
        label: Class or category, 0 or more; -1 where there is none.
        part_labels: `(m,)`, a part for each point.
        faces: Triangles `(f, 3)` of a mesh, as rows of `points`.
        up: Axis that points upward.
    """

    name: str
    points: np.ndarray
    label: int = UNLABELLED
    part_labels: np.ndarray | None = None
    faces: np.ndarray | None = None
    up: Up = "y"


class CloudFiles(Sequence[Cloud]):
    """Clouds in one file each.

    Args:
        files: Paths and labels, in the order of the samples.
        read: Gives the cloud of a path; whatever it raises is a refusal of that file.
        up: Axis that points upward in the files.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], read: Callable[[Path], Cloud], up: Up = "y") -> None:
        self.files, self.read, self.up = files, read, up

    def __len__(self) -> int:
        """Count the files."""
        return len(self.files)

    def __getitem__(self, index: int) -> Cloud:  # type: ignore[override]
        """Read one file.

        Raises:
            UserError: It cannot be read; the message names it and says why.
        """
        path, label = self.files[index]
        try:
            cloud = self.read(path)
        except UserError:
            raise
        except Exception as error:  # a reader of the user's own may raise anything
            raise UserError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
        return replace(cloud, label=label, up=self.up)


class CloudArrays(Sequence[Cloud]):
    """Clouds of one size in memory.

    Args:
        name: What messages call the array, such as its file.
        points: `(clouds, m, 3 or more)`.
        labels: `(clouds,)`, a class each.
        up: Axis that points upward.
    """

    def __init__(self, name: str, points: np.ndarray, labels: np.ndarray, up: Up = "y") -> None:
        self.name, self.points, self.labels, self.up = name, points, labels, up

    def __len__(self) -> int:
        """Count the clouds."""
        return len(self.points)

    def __getitem__(self, index: int) -> Cloud:  # type: ignore[override]
        """Give one cloud, named by its place."""
        return Cloud(f"{self.name}[{index}]", self.points[index], int(self.labels[index]), up=self.up)
