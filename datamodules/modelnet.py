"""ModelNet40 and ModelNet10 in the layouts that people have: HDF5, resampled text, and the original meshes."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from pack_ptq.datamodules.cloud import Cloud, CloudFiles
from pack_ptq.datamodules.cloud_formats import read_cloud
from pack_ptq.datamodules.hdf5_clouds import read_hdf5
from pack_ptq.datamodules.point_labels import ClassLabels, PointLabels
from pack_ptq.datamodules.rooted_points import RootedPointData
from pack_ptq.errors import UserError

NAMES40 = [
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop", "mantel",
    "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa", "stairs", "stool",
    "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox"
]  # fmt: skip
NAMES10 = ["bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet"]


class ModelNet40Data(RootedPointData):
    """ModelNet40: 9843 objects of 40 classes to calibrate from, 2468 to test.

    `root` may be modelnet40_ply_hdf5_2048 (needs h5py), modelnet40_normal_resampled, or the original meshes
    `<class>/{train,test}/*.off`, which are sampled uniformly by area and turned from z up.
    """

    names = NAMES40

    def calibration_clouds(self) -> Sequence[Cloud]:
        """Give the training split."""
        return self._split("train")

    def test_clouds(self) -> Sequence[Cloud]:
        """Give the test split."""
        return self._split("test")

    @cached_property
    def labels(self) -> PointLabels:  # type: ignore[override]
        """The classes."""
        return ClassLabels(self.names)

    def _split(self, split: str) -> Sequence[Cloud]:
        title = f"modelnet{len(self.names)}"
        if (self.root / "train_files.txt").is_file():
            # The lists give paths from where the benchmark was first run: only the names count.
            return read_hdf5([self.root / Path(line).name for line in self.read_list(f"{split}_files.txt")])
        if (self.root / f"{title}_train.txt").is_file():
            return CloudFiles([self._text_file(shape) for shape in self.read_list(f"{title}_{split}.txt")], read_cloud)
        meshes = [
            (path, label)
            for label, name in enumerate(self.names)
            for path in sorted((self.root / name / split).glob("*.off"))
        ]
        if not meshes:
            raise self.refuse_root(
                f"a folder with train_files.txt and test_files.txt (HDF5), with {title}_train.txt and {title}_test.txt"
                f" (resampled text), or with {self.names[0]}/{split}/*.off (meshes)"
            )
        return CloudFiles(meshes, read_cloud, up="z")

    def _text_file(self, shape: str) -> tuple[Path, int]:
        name = shape.rpartition("_")[0]
        if name not in self.names:
            raise UserError(f"{self.root} lists the shape {shape!r}; allowed: CLASS_NUMBER, CLASS of ModelNet")
        return self.root / name / f"{shape}.txt", self.names.index(name)


class ModelNet10Data(ModelNet40Data):
    """ModelNet10: 3991 objects of 10 classes to calibrate from, 908 to test.

    `root` may be modelnet40_normal_resampled, which lists these objects too, or the original meshes
    `<class>/{train,test}/*.off`, which are sampled uniformly by area and turned from z up.
    """

    names = NAMES10
