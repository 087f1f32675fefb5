"""ScanObjectNN's files, by their folder or by one variant's name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pack_ptq.datamodules import ScanObjectNNData
from pack_ptq.errors import UserError

RANDOM = np.random.RandomState(0)
HARDEST = "objectdataset_augmentedrot_scale75.h5"
SETTINGS: dict[str, Any] = {"num_points": 16, "num_calibration": 4, "batch_size": 2}


@pytest.fixture
def root(tmp_path: Path, write_hdf5: Any) -> Path:
    for name, labels in (("objectdataset.h5", [0, 14, 3, 3, 3]), (HARDEST, [7, 8, 9, 1, 1])):
        for split in ("training", "test"):
            points = RANDOM.standard_normal((5, 20, 3)).astype(np.float32)
            mask = np.zeros((5, 20), np.int32)
            write_hdf5(tmp_path / f"{split}_{name}", data=points, label=np.array(labels), mask=mask)
    return tmp_path


def test_folder_and_variant(root: Path) -> None:
    data = ScanObjectNNData(root, **SETTINGS)
    data.check()
    assert [label for _, label in data.test_dataset()] == [0, 14, 3, 3, 3]
    assert len(data.labels.names) == 15
    hardest = ScanObjectNNData(root / f"training_{HARDEST}", **SETTINGS)
    assert [label for _, label in hardest.test_dataset()] == [7, 8, 9, 1, 1]
    assert "training" in hardest.calibration_clouds()[0].name


@pytest.mark.parametrize("name", ["missing", "training_other.h5", "test_objectdataset.h5"])
def test_other_places_are_refused(root: Path, name: str) -> None:
    allowed = r"a folder with training_objectdataset\.h5 and test_objectdataset\.h5, or a training_\*\.h5"
    with pytest.raises(UserError, match=rf"data\.init_args\.root is '.*{name}'; allowed: {allowed}"):
        ScanObjectNNData(root / name, **SETTINGS).check()


def test_a_missing_test_file_is_refused(root: Path) -> None:
    (root / "test_objectdataset.h5").unlink()
    with pytest.raises(UserError, match=r"test_\*\.h5 beside it"):
        ScanObjectNNData(root, **SETTINGS).check()
