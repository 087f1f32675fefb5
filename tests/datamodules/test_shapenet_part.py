"""ShapeNetPart, written as the benchmark is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pack_ptq.datamodules import ShapeNetPartData
from pack_ptq.datamodules.shapenet_part import PARTS
from pack_ptq.errors import UserError

SYNSETS = dict(zip(PARTS, ["02691156", "02773838", "02954340", "02958343", "03001627", "03261776", "03467517",
                           "03624134", "03636649", "03642806", "03790512", "03797390", "03948459", "04099429",
                           "04225987", "04379243"], strict=True))  # fmt: skip
# As published with the benchmark.
PUBLISHED = {"Earphone": [16, 17, 18], "Motorbike": [30, 31, 32, 33, 34, 35], "Rocket": [41, 42, 43],
             "Car": [8, 9, 10, 11], "Laptop": [28, 29], "Cap": [6, 7], "Skateboard": [44, 45, 46], "Mug": [36, 37],
             "Guitar": [19, 20, 21], "Bag": [4, 5], "Lamp": [24, 25, 26, 27], "Table": [47, 48, 49],
             "Airplane": [0, 1, 2, 3], "Pistol": [38, 39, 40], "Chair": [12, 13, 14, 15],
             "Knife": [22, 23]}  # fmt: skip
SETTINGS: dict[str, Any] = {"num_points": 32, "num_calibration": 4, "batch_size": 2}


def write_shape(root: Path, category: str, name: str, parts: list[int], columns: int = 7) -> str:
    random = np.random.RandomState(len(name))
    rows = np.concatenate([random.standard_normal((40, 6)), random.choice(parts, (40, 1))], 1)[:, -columns:]
    path = root / SYNSETS[category] / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(" ".join(f"{x:.6f}" for x in row) + "\n" for row in rows))
    return f"shape_data/{SYNSETS[category]}/{name}"


def write_list(root: Path, split: str, shapes: list[str]) -> None:
    (root / "train_test_split").mkdir(exist_ok=True)
    (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(shapes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    lines = [f"{name}\t{synset}\n" for name, synset in SYNSETS.items()]
    (tmp_path / "synsetoffset2category.txt").write_text("".join(lines))
    shapes = [write_shape(tmp_path, category, f"1a{i}", PUBLISHED[category]) for i, category in enumerate(PARTS)]
    write_list(tmp_path, "train", shapes[::-1])
    write_list(tmp_path, "test", [shapes[4], shapes[0]])
    return tmp_path


def test_parts_are_the_published_ones() -> None:
    data = ShapeNetPartData("/nowhere")
    assert data.labels.names == sorted(PUBLISHED)
    bounds = np.cumsum([0, *PARTS.values()])
    assert {name: list(range(*bounds[i : i + 2])) for i, name in enumerate(PARTS)} == PUBLISHED


def test_samples(root: Path) -> None:
    data = ShapeNetPartData(root, **SETTINGS)
    data.check()
    assert len(data.calibration_clouds()) == 16
    points, parts = data.test_dataset()[0]
    assert (tuple(points.shape), tuple(parts.shape), parts.dtype) == ((32, 19), (32,), torch.int64)
    assert points[:, 3:].argmax(1).unique().tolist() == [4]
    table = np.loadtxt(root / SYNSETS["Chair"] / "1a4.txt")
    assert parts.tolist() == table[:32, 6].astype(int).tolist()
    offset = table[:, :3] - table[:, :3].mean(0)
    expected = offset / np.linalg.norm(offset, axis=1).max()
    np.testing.assert_allclose(points[:, :3].numpy(), expected[:32], atol=1e-5)


def test_metrics_of_a_perfect_network(root: Path) -> None:
    data = ShapeNetPartData(root, **SETTINGS)
    for metric in data.metrics().values():
        for _, parts in data.test_dataloader():
            metric.update(torch.nn.functional.one_hot(parts, 50).float(), parts)
        assert metric.compute() == 1


def test_parts_of_another_category_are_refused(root: Path) -> None:
    write_list(root, "test", [write_shape(root, "Bag", "wrong", [3])])
    with pytest.raises(UserError, match=r"wrong\.txt has the part 3; allowed for Bag: 4 to 5"):
        ShapeNetPartData(root, **SETTINGS).check()


def test_rows_of_another_length_are_refused(root: Path) -> None:
    write_list(root, "test", [write_shape(root, "Bag", "short", [4], columns=4)])
    with pytest.raises(UserError, match=r"short\.txt has 4 columns; allowed: 7 \(x, y, z, nx, ny, nz, part\)"):
        ShapeNetPartData(root, **SETTINGS).check()
    (root / SYNSETS["Bag"] / "short.txt").write_text("")
    with pytest.raises(UserError, match=r"short\.txt has 0 columns; allowed: 7"):
        ShapeNetPartData(root, **SETTINGS).check()
    (root / SYNSETS["Bag"] / "short.txt").write_text("x y z\n")
    with pytest.raises(UserError, match=r"short\.txt cannot be read: could not convert"):
        ShapeNetPartData(root, **SETTINGS).check()


def test_missing_lists_and_categories_are_refused(root: Path) -> None:
    write_list(root, "test", ["shape_data/00000000/1a"])
    with pytest.raises(UserError, match="lists the shape 'shape_data/00000000/1a'; allowed: shape_data/SYNSET/ID of"):
        ShapeNetPartData(root, **SETTINGS).check()
    (root / "train_test_split" / "shuffled_train_file_list.json").unlink()
    with pytest.raises(UserError, match=r"data\.init_args\.root is .*readable train_test_split/shuffled_train"):
        ShapeNetPartData(root, **SETTINGS).check()
    (root / "synsetoffset2category.txt").write_text("Airplane\t02691156\nMug\t03797390\n")
    with pytest.raises(UserError, match="gives a synset for each category, also for Bag, Cap, Car"):
        ShapeNetPartData(root, **SETTINGS).check()
    with pytest.raises(UserError, match=r"a folder with a readable synsetoffset2category\.txt"):
        ShapeNetPartData(root / "missing", **SETTINGS).check()
