"""ModelNet in its three layouts, written as the originals are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pack_ptq.datamodules import ModelNet10Data, ModelNet40Data
from pack_ptq.datamodules.modelnet import NAMES10, NAMES40
from pack_ptq.errors import UserError

RANDOM = np.random.RandomState(0)
SETTINGS: dict[str, Any] = {"num_points": 16, "num_calibration": 4, "batch_size": 2, "normalize": "none"}


def text_root(root: Path, shapes: list[str], classes: int = 40) -> Path:
    for split in ("train", "test"):
        (root / f"modelnet{classes}_{split}.txt").write_text("\n".join(shapes) + "\n")
    for seed, shape in enumerate(shapes):
        folder = root / shape.rpartition("_")[0]
        folder.mkdir(exist_ok=True)
        rows = np.random.RandomState(seed).standard_normal((20, 6))
        (folder / f"{shape}.txt").write_text("".join(",".join(f"{x:.6f}" for x in row) + "\n" for row in rows))
    return root


def off_root(root: Path, names: list[str]) -> Path:
    """Write a flag in x and z for every class, z being upward, with ModelNet's defect in every other file."""
    for split in ("train", "test"):
        for number, name in enumerate(names):
            folder = root / name / split
            folder.mkdir(parents=True)
            for shape in (1, 2):
                first = "OFF" if (number + shape) % 2 else "OFF\n"
                text = f"{first}3 1 0\n0 0 0\n0 0 {10 * shape}\n1 0 {10 * shape}\n3 0 1 2\n"
                (folder / f"{name}_{shape:04d}.off").write_text(text)
    return root


def test_names_are_in_label_order() -> None:
    assert (len(NAMES40), len(NAMES10)) == (40, 10)
    assert sorted(NAMES40) == NAMES40
    assert sorted(NAMES10) == NAMES10
    assert set(NAMES10) < set(NAMES40)
    classes = Path(__file__).parents[2] / "../shared/assets/pointclouds/classes.txt"
    if classes.is_file():
        assert classes.read_text().split() == NAMES40


def test_hdf5(tmp_path: Path, write_hdf5: Any) -> None:
    root = tmp_path / "modelnet40_ply_hdf5_2048"
    points, labels = RANDOM.standard_normal((6, 32, 3)).astype(np.float32), np.array([[39], [0], [5], [7], [1], [2]])
    for split, count in (("train", 2), ("test", 1)):
        for number in range(count):
            write_hdf5(root / f"ply_data_{split}{number}.h5", data=points + number, label=labels.astype(np.uint8))
        lines = [f"data/modelnet40_ply_hdf5_2048/ply_data_{split}{number}.h5\n" for number in range(count)]
        (root / f"{split}_files.txt").write_text("".join(lines))
    data = ModelNet40Data(root, **SETTINGS)
    data.check()
    assert len(data.calibration_clouds()) == 12
    assert [label for _, label in data.test_dataset()] == labels.flatten().tolist()
    np.testing.assert_array_equal(data.test_dataset()[3][0].numpy(), points[3, :16])
    write_hdf5(root / "ply_data_test0.h5", data=points, label=labels + 1)
    with pytest.raises(UserError, match=r"ply_data_test0\.h5\[0\] has the label 40; allowed: 0 to 39"):
        ModelNet40Data(root, **SETTINGS).check()


def test_resampled_text(tmp_path: Path) -> None:
    shapes = ["airplane_0001", "night_stand_0002", "xbox_0103", "tv_stand_0001"]
    data = ModelNet40Data(text_root(tmp_path, shapes), **SETTINGS)
    data.check()
    assert [label for _, label in data.test_dataset()] == [NAMES40.index(s.rpartition("_")[0]) for s in shapes]
    expected = np.random.RandomState(1).standard_normal((20, 6))[:16, :3]
    np.testing.assert_allclose(data.test_dataset()[1][0].numpy(), expected, atol=1e-6)


def test_ten_classes_of_the_resampled_text(tmp_path: Path) -> None:
    text_root(tmp_path, ["airplane_0001", "bathtub_0001"])
    data = ModelNet10Data(text_root(tmp_path, ["bathtub_0001", "toilet_0001"], classes=10), **SETTINGS)
    assert [label for _, label in data.test_dataset()] == [0, 9]
    (tmp_path / "modelnet10_test.txt").write_text("airplane_0001\n")
    with pytest.raises(UserError, match="lists the shape 'airplane_0001'; allowed: CLASS_NUMBER, CLASS of ModelNet"):
        data.test_clouds()


def test_meshes_are_sampled_and_turned_upright(tmp_path: Path) -> None:
    data = ModelNet10Data(off_root(tmp_path, NAMES10), **SETTINGS)
    data.check()
    points = np.stack([points.numpy() for points, _ in data.test_dataset()])
    assert [label for _, label in data.test_dataset()] == [c for c in range(10) for _ in range(2)]
    assert (points[..., 2] == 0).all()
    assert points[::2, :, 1].max() == pytest.approx(10, abs=1)
    assert points[1::2, :, 1].max() == pytest.approx(20, abs=2)
    assert (np.ptp(points[..., 1], axis=1) > np.ptp(points[..., 0], axis=1)).all()
    assert data.fingerprint() == ModelNet10Data(tmp_path, **SETTINGS).fingerprint()
    again = ModelNet10Data(tmp_path, **SETTINGS, sampling_seed=1)
    assert data.fingerprint() != again.fingerprint()


@pytest.mark.parametrize(("kind", "classes"), [(ModelNet10Data, 10), (ModelNet40Data, 40)])
def test_other_folders_are_refused_with_all_layouts(tmp_path: Path, kind: type, classes: int) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError) as refusal:
            kind(root).check()
        message = str(refusal.value)
        assert message.startswith(f"data.init_args.root is '{root}'; allowed: a folder with train_files.txt")
        assert f"modelnet{classes}_train.txt" in message
        assert ".off (meshes)" in message
