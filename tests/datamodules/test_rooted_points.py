"""A benchmark's folder: a plug-in without an `__init__`, its lists, and their refusals."""

import json
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import numpy as np
import pytest

from pack_ptq.datamodules import ClassLabels, Cloud, CloudFiles, PTQData, RootedPointData, read_cloud
from pack_ptq.describe import describe
from pack_ptq.errors import UserError


class Bolts(RootedPointData):
    """Bolts and nuts, listed in train.txt and test.txt."""

    labels = ClassLabels(["bolt", "nut"])  # type: ignore[assignment]

    def calibration_clouds(self) -> Sequence[Cloud]:
        return self._split("train.txt")

    def test_clouds(self) -> Sequence[Cloud]:
        return self._split("test.txt")

    def _split(self, name: str) -> Sequence[Cloud]:
        files = [(self.root / f"{shape}.txt", int(shape.startswith("nut"))) for shape in self.read_list(name)]
        return CloudFiles(files, read_cloud)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = ["bolt1", "nut1", "bolt2", "nut2"]
    for seed, name in enumerate(names):
        np.savetxt(tmp_path / f"{name}.txt", np.random.RandomState(seed).standard_normal((9, 3)))
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(names))
    return tmp_path


def test_plug_in_by_class_path(root: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PTQData, "data", required=True)
    settings = {"root": str(root), "num_points": 8, "num_calibration": 4, "batch_size": 2}
    config = {"class_path": f"{__name__}.Bolts", "init_args": settings}
    data = parser.instantiate_classes(parser.parse_object({"data": config})).data
    data.check()
    assert [label for _, label in data.test_dataset()] == [0, 1, 0, 1]
    described = describe(data)["init_args"]
    assert settings.items() <= described.items()
    assert Bolts(**described).fingerprint() == data.fingerprint()


def test_a_listed_file_that_is_missing_is_named(root: Path) -> None:
    (root / "nut1.txt").unlink()
    with pytest.raises(UserError, match=r"1 test clouds of 4 that cannot serve: .*nut1\.txt cannot be read: No such"):
        Bolts(root, num_calibration=2, on_corrupt="refuse").test_dataset()


def test_lists_that_cannot_serve_are_refused(root: Path) -> None:
    data = Bolts(root)
    (root / "test.txt").unlink()
    with pytest.raises(UserError, match=r"data\.init_args\.root is '.*'; allowed: a folder with a readable test\.txt"):
        data.test_clouds()
    for content in ("", " \n"):
        (root / "test.txt").write_text(content)
        with pytest.raises(UserError, match=r"a folder whose test\.txt is a list of one name or more"):
            data.test_clouds()
    (root / "test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"a folder with a readable test\.txt \(.*decode"):
        data.test_clouds()
    for content, message in (("{", "readable test.txt"), ('{"a": 1}', "a list of one name")):
        (root / "test.txt").write_text(content)
        with pytest.raises(UserError, match=message):
            data.read_list("test.txt", json.loads)
