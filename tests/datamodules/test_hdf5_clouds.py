"""HDF5 files with `data` and `label`, and every way in which they may be something else."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pack_ptq.datamodules.hdf5_clouds import read_hdf5
from pack_ptq.errors import UserError

POINTS = np.random.RandomState(0).standard_normal((5, 8, 3)).astype(np.float32)
LABELS = np.arange(5, dtype=np.uint8)


def test_files_one_after_another(tmp_path: Path, write_hdf5: Any) -> None:
    first = write_hdf5(tmp_path / "a.h5", data=POINTS, label=LABELS[:, None], mask=np.zeros((5, 8)))
    second = write_hdf5(tmp_path / "b.h5", data=POINTS[:2] + 1, label=LABELS[:2])
    clouds = read_hdf5([first, second])
    assert len(clouds) == 7
    assert [clouds[i].label for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert clouds[6].name == f"{second}[1]"
    np.testing.assert_array_equal(clouds[6].points, POINTS[1] + 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": POINTS}, "cannot be read: .*label"),
        ({"label": LABELS}, "cannot be read: .*data"),
        ({"data": POINTS[0], "label": LABELS}, r"has `data` \(8, 3\) in float32 and `label` \(5,\) in uint8; allowed"),
        ({"data": POINTS[..., :2], "label": LABELS}, r"has `data` \(5, 8, 2\) in float32"),
        (
            {"data": POINTS, "label": LABELS[:4]},
            r"has .* and `label` \(4,\) in uint8; allowed: `data` \(clouds, points, 3",
        ),
        ({"data": POINTS, "label": LABELS.astype(np.float32)}, r"has .* and `label` \(5,\) in float32; allowed"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, write_hdf5: Any, arrays: dict, message: str) -> None:
    path = write_hdf5(tmp_path / "a.h5", **arrays)
    with pytest.raises(UserError, match=rf"a\.h5 {message}"):
        read_hdf5([path])


def test_missing_and_broken_files_are_refused(tmp_path: Path, write_hdf5: Any) -> None:
    path = tmp_path / "a.h5"
    for content in (None, b"", b"no HDF5"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.h5 cannot be read: .*allowed: an HDF5 file with `data`"):
            read_hdf5([path])


def test_h5py_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"a\.h5 needs h5py, which is not installed: pip install h5py"):
        read_hdf5([tmp_path / "a.h5"])
