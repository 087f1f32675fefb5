"""Clouds in class folders or one file: which with which labels, and every refusal before work starts."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pack_ptq.datamodules import PointFolderData
from pack_ptq.describe import describe
from pack_ptq.errors import UserError

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / os.environ.get("PACK_PTQ_ASSETS", "../shared/assets")


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    points = np.random.RandomState(seed).standard_normal((20, 3))
    if path.suffix == ".npz":
        np.savez(path, points=points)
    else:
        head = {".off": "OFF\n20 0 0\n", ".ply": "ply\nformat ascii 1.0\nelement vertex 20\nproperty float x\n"
                "property float y\nproperty float z\nend_header\n"}  # fmt: skip
        path.write_text(head.get(path.suffix, "") + "".join(f"{x} {y} {z}\n" for x, y, z in points))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three classes with six clouds to calibrate from and two to test, each in another format."""
    endings = (".ply", ".off", ".npz", ".txt")
    for number, name in enumerate(("bolt", "nut", "washer")):
        for cloud in range(6):
            save(tmp_path / "calibration" / name / f"{cloud}{endings[cloud % 4]}", number * 100 + cloud)
        for cloud in range(2):
            save(tmp_path / "test" / name / f"{cloud}{endings[cloud + 2]}", 1000 + number * 100 + cloud)
    return tmp_path


def make(folders: Path, **settings: Any) -> PointFolderData:
    arguments = {"num_points": 16, "num_calibration": 8, "batch_size": 4} | settings
    places = {name: arguments.pop(name, folders / name) for name in ("calibration", "test")}
    return PointFolderData(**places, **arguments)


def refusal(data: PointFolderData) -> str:
    with pytest.raises(UserError) as caught:
        data.check()
    return str(caught.value)


def many(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_samples_have_the_labels_of_their_folders(folders: Path) -> None:
    data = make(folders, normalize="none")
    data.check()
    assert [label for _, label in data.test_dataset()] == [0, 0, 1, 1, 2, 2]
    expected = np.random.RandomState(1101).standard_normal((20, 3))[:16]
    np.testing.assert_allclose(data.test_dataset()[3][0].numpy(), expected, atol=1e-6)
    assert len(data.calibration_clouds()) == 18
    for cloud in data.calibration_clouds():
        assert Path(cloud.name).parent.name == ("bolt", "nut", "washer")[cloud.label]


def test_all_formats_and_hidden_files(folders: Path) -> None:
    (folders / "calibration" / "bolt" / ".hidden.txt").write_text("x")
    (folders / "calibration" / "bolt" / "notes.md").write_text("x")
    save(folders / "calibration" / "bolt" / "deeper" / "9.txt")
    data = make(folders, num_calibration=None)
    data.check()
    assert len(data.calibration_dataset()) == 19  # type: ignore[arg-type]


def test_flat_calibration_has_no_labels(folders: Path) -> None:
    for seed in range(5):
        save(folders / "flat" / f"{seed}.txt", seed)
    data = make(folders, calibration=folders / "flat", num_calibration=5)
    data.check()
    assert {label for _, label in data.calibration_dataset()} == {-1}
    assert "test" in refusal(make(folders, test=folders / "flat"))


def test_classes_file_gives_the_order(folders: Path) -> None:
    (folders / "classes.txt").write_text("washer\nscrew\nbolt\nnut\n")
    data = make(folders, classes=folders / "classes.txt")
    assert [label for _, label in data.test_dataset()] == [2, 2, 3, 3, 0, 0]
    data.check_output(torch.zeros(2, 4))


def test_stored_axis(folders: Path) -> None:
    stored, turned = (make(folders, stored_up=up, normalize="none").test_dataset()[0][0] for up in ("y", "z"))
    assert torch.equal(turned, torch.stack([stored[:, 0], stored[:, 2], -stored[:, 1]], 1))


def test_many_clouds_in_one_file(folders: Path) -> None:
    points = np.random.RandomState(0).standard_normal((10, 20, 3)).astype(np.float32)
    (folders / "classes.txt").write_text("bolt\nnut\n")
    train = many(folders / "train.npz", points=points)
    test = many(folders / "test.npz", points=points, labels=np.arange(10) % 2)
    data = make(folders, calibration=train, test=test, classes=folders / "classes.txt", normalize="none")
    data.check()
    assert [label for _, label in data.test_dataset()] == [0, 1] * 5
    np.testing.assert_array_equal(data.test_dataset()[4][0].numpy(), points[4, :16])
    assert {label for _, label in data.calibration_dataset()} == {-1}
    assert "data.init_args.classes is None; allowed: a text file of class names" in refusal(make(folders, test=test))


def test_real_objects() -> None:
    places = {name: ASSETS / "pointclouds" / f"shapes_{name}.npz" for name in ("calibration", "test")}
    if not places["test"].is_file():
        pytest.skip(f"no real clouds in {places['test']}")
    data = PointFolderData(**places, classes=ASSETS / "pointclouds" / "classes.txt", num_calibration=None)
    data.check()
    assert (len(data.calibration_dataset()), len(data.test_dataset())) == (96, 214)  # type: ignore[arg-type]
    with np.load(places["test"]) as arrays:
        np.testing.assert_allclose(data.test_dataset()[7][0].numpy(), arrays["points"][7, :1024], atol=1e-6)


@pytest.mark.parametrize(
    "arrays",
    [
        {"points": np.zeros((4, 20, 3))},
        {"labels": np.arange(4)},
        {"points": np.zeros((20, 3)), "labels": np.arange(20)},
        {"points": np.zeros((4, 20, 3)), "labels": np.arange(3)},
        {"points": np.zeros((4, 20, 3)), "labels": np.arange(4.0)},
    ],
)
def test_other_files_of_many_clouds_are_refused(folders: Path, arrays: dict) -> None:
    (folders / "classes.txt").write_text("bolt\nnut\n")
    path = many(folders / "test.npz", **arrays)
    calibration = many(folders / "train.npz", points=np.random.RandomState(0).standard_normal((8, 20, 3)))
    message = refusal(make(folders, calibration=calibration, test=path, classes=folders / "classes.txt"))
    assert message.startswith(f"data.init_args.test is '{path}'; allowed: an .npz file with `points` (clouds, m, 3)")


def test_missing_file_of_many_clouds_is_refused(folders: Path) -> None:
    message = refusal(make(folders, calibration=folders / "missing.npz"))
    assert message.startswith("data.init_args.calibration is ")


def test_folders_that_cannot_serve_are_refused(folders: Path) -> None:
    empty = folders / "empty"
    for name in ("bolt", "nut", "washer"):
        (empty / name).mkdir(parents=True)
    for name, place in (("calibration", empty), ("test", empty), ("calibration", folders / "missing")):
        message = refusal(make(folders, **{name: place}))
        assert message.startswith(
            f"data.init_args.{name} is '{place}'; allowed: a folder with one sub-folder per class"
        )
    save(folders / "calibration" / "screw" / "0.txt")
    assert "sub-folders named in data.init_args.test, but not screw" in refusal(make(folders))


def test_one_class_is_refused(folders: Path) -> None:
    save(folders / "one" / "bolt" / "0.txt")
    assert "two or more unless data.init_args.classes names them" in refusal(make(folders, test=folders / "one"))


def test_broken_clouds_are_named_or_skipped(folders: Path) -> None:
    (folders / "test" / "nut" / "1.txt").write_text("")
    (folders / "test" / "bolt" / "0.npz").write_bytes(b"")
    message = refusal(make(folders))
    assert "2 test clouds of 6" in message
    assert "0.npz cannot be read" in message
    assert "1.txt has 0 points" in message
    with pytest.warns(UserWarning, match="are left out"):
        assert len(make(folders, on_corrupt="skip").test_dataset()) == 4  # type: ignore[arg-type]


def test_settings(folders: Path) -> None:
    with pytest.raises(UserError, match=r"data\.init_args\.stored_up is 'x'; allowed: y, z"):
        make(folders, stored_up="x")
    data = make(folders, stored_up="z", augment_jitter=0.5)
    assert PointFolderData(**describe(data)["init_args"]).fingerprint() == data.fingerprint()
