"""A cloud from a file of any known format."""

import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.off_file import read_off
from pack_ptq.datamodules.ply_file import read_ply
from pack_ptq.errors import UserError

BROKEN = (OSError, ValueError, TypeError, LookupError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


def read_table(path: Path) -> np.ndarray:
    """Read a text file of numbers, one point a line, parted by commas, blanks or both; `#` begins a comment.

    Returns:
        `(points, columns)` in float64.

    Raises:
        ValueError: A word is no number, or lines differ in their number of columns.
    """
    text = path.read_text(encoding="utf-8").replace(",", " ")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loadtxt: input contained no data")
        return np.loadtxt(text.splitlines(), ndmin=2)


def _from_text(path: Path) -> Cloud:
    table = read_table(path)
    if table.size and table.shape[1] < 3:
        raise ValueError(f"it has {table.shape[1]} columns, not 3 or more (x, y, z)")
    return Cloud(str(path), table[:, :3] if table.size else np.empty((0, 3)))


def _from_npz(path: Path) -> Cloud:
    with np.load(path) as arrays:
        if "points" not in arrays.files:
            raise ValueError(f"it has the arrays {arrays.files}, not `points`")
        return Cloud(str(path), arrays["points"], part_labels=arrays["labels"] if "labels" in arrays.files else None)


def _from_ply(path: Path) -> Cloud:
    points, faces = read_ply(path)
    return Cloud(str(path), points, faces=faces)


def _from_off(path: Path) -> Cloud:
    points, faces = read_off(path)
    return Cloud(str(path), points, faces=faces)


READERS: dict[str, Callable[[Path], Cloud]] = {
    ".ply": _from_ply,
    ".off": _from_off,
    ".npz": _from_npz,
    ".txt": _from_text,
}


def read_cloud(path: Path) -> Cloud:
    """Read a file by its ending: .ply, .off, .npz (`points`, and optionally `labels` of the points) or .txt.

    Raises:
        UserError: The file cannot be read; the message names it and says why.
    """
    try:
        return READERS[path.suffix.lower()](path)
    except BROKEN as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read: {why}") from error
