"""Clouds from HDF5 files with `data` and `label`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pack_ptq.datamodules.cloud import Cloud, CloudArrays
from pack_ptq.errors import UserError

LAYOUT = "`data` (clouds, points, 3 or more) in numbers and `label` (clouds,) or (clouds, 1) in integers"


class ChainedClouds(Sequence[Cloud]):
    """Clouds of several sequences, one after another."""

    def __init__(self, parts: Sequence[Sequence[Cloud]]) -> None:
        self.places = [(part, index) for part in parts for index in range(len(part))]

    def __len__(self) -> int:
        """Count the clouds."""
        return len(self.places)

    def __getitem__(self, index: int) -> Cloud:  # type: ignore[override]
        """Give one cloud of one of the sequences."""
        part, inside = self.places[index]
        return part[inside]


def read_hdf5(paths: Sequence[Path]) -> Sequence[Cloud]:
    """Read the clouds of all files into memory, in their order.

    Raises:
        UserError: h5py is not installed, or a file is missing, unreadable, or of another layout.
    """
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise UserError(f"{paths[0]} needs h5py, which is not installed: pip install h5py") from error
    return ChainedClouds([_read(h5py, path) for path in paths])


def _read(h5py: Any, path: Path) -> CloudArrays:
    try:
        with h5py.File(path, "r") as file:
            points, labels = np.asarray(file["data"][()]), np.asarray(file["label"][()])
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}; allowed: an HDF5 file with {LAYOUT}") from error
    fits = points.ndim == 3 and points.shape[2] >= 3 and points.dtype.kind in "fiu"
    if not fits or labels.dtype.kind not in "iu" or labels.size != len(points):
        found = f"`data` {points.shape} in {points.dtype} and `label` {labels.shape} in {labels.dtype}"
        raise UserError(f"{path} has {found}; allowed: {LAYOUT}")
    return CloudArrays(str(path), points, labels.reshape(-1))
