"""ShapeNetPart: every point of a shape belongs to one of its category's parts."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from pack_ptq.datamodules.cloud import Cloud, CloudFiles
from pack_ptq.datamodules.cloud_formats import read_table
from pack_ptq.datamodules.point_labels import PartLabels, PointLabels
from pack_ptq.datamodules.rooted_points import RootedPointData
from pack_ptq.errors import UserError

PARTS = {"Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2, "Lamp": 4,
         "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3}  # fmt: skip
CATEGORIES = "synsetoffset2category.txt"
COLUMNS = 7


class ShapeNetPartData(RootedPointData):
    """ShapeNetPart: 16 categories with 50 parts, the training list to calibrate from, the test list to test.

    `root` is shapenetcore_partanno_segmentation_benchmark_v0_normal: rows of x, y, z, normal and part in
    `<synset>/<id>.txt`, the lists in `train_test_split`, and synsetoffset2category.txt.
    """

    def calibration_clouds(self) -> Sequence[Cloud]:
        """Give the shapes of the training list."""
        return self._split("train")

    def test_clouds(self) -> Sequence[Cloud]:
        """Give the shapes of the test list."""
        return self._split("test")

    @cached_property
    def labels(self) -> PointLabels:  # type: ignore[override]
        """The categories with their parts."""
        return PartLabels(PARTS)

    def _split(self, split: str) -> Sequence[Cloud]:
        words = self.read_list(CATEGORIES)
        labels = {synset: list(PARTS).index(name) for name, synset in zip(words[::2], words[1::2], strict=False)
                  if name in PARTS}  # fmt: skip
        if len(labels) != len(PARTS):
            missing = ", ".join(name for name in PARTS if name not in words[::2])
            raise self.refuse_root(f"a folder whose {CATEGORIES} gives a synset for each category, also for {missing}")
        shapes = self.read_list(f"train_test_split/shuffled_{split}_file_list.json", json.loads)
        return CloudFiles([self._file(shape, labels) for shape in shapes], read_labelled_rows)

    def _file(self, shape: object, labels: dict[str, int]) -> tuple[Path, int]:
        synset, _, name = str(shape).removeprefix("shape_data/").partition("/")
        if synset not in labels:
            raise UserError(f"{self.root} lists the shape {shape!r}; allowed: shape_data/SYNSET/ID of {CATEGORIES}")
        return self.root / synset / f"{name}.txt", labels[synset]


def read_labelled_rows(path: Path) -> Cloud:
    """Read rows of x, y, z, three numbers of the normal, and the part.

    Raises:
        OSError: The file is missing.
        ValueError: It holds something else than numbers.
        UserError: It has another number of columns.
    """
    table = read_table(path)
    columns = table.shape[1] if table.size else 0
    if columns != COLUMNS:
        raise UserError(f"{path} has {columns} columns; allowed: {COLUMNS} (x, y, z, nx, ny, nz, part)")
    return Cloud(str(path), table[:, :3], part_labels=table[:, 6])
