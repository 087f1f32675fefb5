"""Clouds and meshes in class folders on disk, or many clouds in one .npz file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.cloud import Cloud, CloudArrays, CloudFiles, Up
from pack_ptq.datamodules.cloud_formats import BROKEN, READERS, read_cloud
from pack_ptq.datamodules.image_listing import class_folders, first_names, read_classes
from pack_ptq.datamodules.point_clouds import PointCloudData
from pack_ptq.datamodules.point_labels import ClassLabels, PointLabels
from pack_ptq.datamodules.samples import UNLABELLED
from pack_ptq.errors import refuse

IN_ONE_FILE = "an .npz file with `points` (clouds, m, 3) and `labels` (clouds,) in integers"


@dataclass(eq=False)
class PointFolderData(PointCloudData):
    """Clouds (.ply, .off, .npz, .txt) in one sub-folder per class, or all in one .npz file.

    Meshes (.off, and .ply with faces) are sampled uniformly by area. What calibrates needs no labels: its clouds may
    lie directly in the folder, and the file needs no `labels`. Paths may be strings.

    Attributes:
        calibration: Folder or .npz file of the calibration clouds.
        test: Folder or .npz file of the test clouds.
        classes: File of class names in label order, one a line; without it, the sorted names of the test folders.
        stored_up: Axis that points upward in the files.

    Raises:
        UserError: A value is out of range.
    """

    calibration: Path
    test: Path
    classes: Path | None = None
    stored_up: Up = "y"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stored_up not in ("y", "z"):
            raise refuse(f"{KEY}.stored_up", self.stored_up, "y, z")
        self.calibration, self.test = Path(self.calibration), Path(self.test)
        self.classes = None if self.classes is None else Path(self.classes)

    def calibration_clouds(self) -> Sequence[Cloud]:
        """Give the clouds of `calibration`, sorted by path."""
        return self._clouds("calibration")

    def test_clouds(self) -> Sequence[Cloud]:
        """Give the clouds of `test`, sorted by path."""
        return self._clouds("test")

    @cached_property
    def labels(self) -> PointLabels:  # type: ignore[override]
        """The classes, from the file or else from the test folders.

        Raises:
            UserError: Nothing gives two or more names.
        """
        if self.classes is not None:
            return ClassLabels(read_classes(self.classes))
        if self.test.suffix == ".npz":
            raise refuse(f"{KEY}.classes", None, "a text file of class names, since an .npz file gives none")
        names = class_folders(self.test, "test")
        if len(names) < 2:
            allowed = f"a folder with one sub-folder of clouds per class, two or more unless {KEY}.classes names them"
            raise refuse(f"{KEY}.test", str(self.test), allowed)
        return ClassLabels(names)

    def _clouds(self, name: str) -> Sequence[Cloud]:
        place = getattr(self, name)
        if place.suffix == ".npz":
            return self._from_file(name, place)
        found, names = class_folders(place, name), self.labels.names
        unknown = [folder for folder in found if folder not in names]
        if unknown:
            source = f"{KEY}.test" if self.classes is None else f"{KEY}.classes"
            raise refuse(f"{KEY}.{name}", str(place), f"sub-folders named in {source}, but not {first_names(unknown)}")
        files = [(path, names.index(folder)) for folder in found for path in _files(place / folder, "**/*")]
        if name == "calibration" and not found:
            files = [(path, UNLABELLED) for path in _files(place, "*")]
        if not files:
            flat = ", or with clouds directly in it" if name == "calibration" else ""
            allowed = f"a folder with one sub-folder per class, with clouds ({', '.join(READERS)}){flat}"
            raise refuse(f"{KEY}.{name}", str(place), f"{allowed}; or {IN_ONE_FILE}")
        return CloudFiles(sorted(files), read_cloud, self.stored_up)

    def _from_file(self, name: str, path: Path) -> Sequence[Cloud]:
        refusal = refuse(f"{KEY}.{name}", str(path), IN_ONE_FILE)
        try:
            with np.load(path) as arrays:
                points = arrays["points"]
                bare = name == "calibration" and "labels" not in arrays.files
                labels = np.full(len(points), UNLABELLED) if bare else arrays["labels"]
        except BROKEN as error:
            raise refusal from error
        if points.ndim != 3 or labels.shape != points.shape[:1] or labels.dtype.kind not in "iu":
            raise refusal
        return CloudArrays(str(path), points, labels, self.stored_up)


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob(pattern) if path.suffix.lower() in READERS and not path.name.startswith(".")]
