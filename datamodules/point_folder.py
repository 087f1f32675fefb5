"""Clouds and meshes in class folders on disk, or many clouds in one .npz file."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.cloud import Cloud, CloudArrays, CloudFiles, Up
from pack_ptq.datamodules.cloud_formats import BROKEN, READERS, read_cloud
from pack_ptq.datamodules.image_listing import class_folders, first_names, read_classes
from pack_ptq.datamodules.point_clouds import PointCloudData
from pack_ptq.datamodules.point_labels import ClassLabels, PointLabels
from pack_ptq.datamodules.point_preparation import Normalize
from pack_ptq.datamodules.point_sampling import PointSampling
from pack_ptq.datamodules.samples import UNLABELLED
from pack_ptq.errors import refuse

IN_ONE_FILE = "an .npz file with `points` (clouds, m, 3) and `labels` (clouds,) in integers"


class PointFolderData(PointCloudData):
    """Clouds (.ply, .off, .npz, .txt) in one sub-folder per class, or all in one .npz file.

    Meshes (.off, and .ply with faces) are sampled uniformly by area. What calibrates needs no labels: its clouds may
    lie directly in the folder, and the file needs no `labels`.

    Args:
        calibration: Folder or .npz file of the calibration clouds.
        test: Folder or .npz file of the test clouds.
        classes: File of class names in label order, one a line; without it, the sorted names of the test folders.
        stored_up: Axis that points upward in the files.
        num_points: As for `PointCloudData`, and so all that follow.
        sampling: Which points of a larger cloud: `first`, `random` or `farthest`.
        sampling_seed: Of the draws of points.
        normalize: `unit_sphere` or `none`.
        up: Axis that the network takes for upward.
        num_calibration: Calibration clouds, 1 or more; without it, all there are.
        calibration_seed: Decides which clouds calibrate.
        batch_size: Samples per batch and process, 1 or more.
        num_workers: Processes that read, prepare and load; 0 does so in the main process.
        augment_rotation: Largest turn of a further view about the upward axis, in degrees, 0 to 180.
        augment_scale: Largest change of its size, as a share of it, 0 up to but not including 1.
        augment_jitter: Standard deviation of its noise, in units of the prepared cloud, 0 or more.
        on_corrupt: `refuse` to start with clouds that cannot serve, or `skip` them.

    Raises:
        UserError: A value is out of range.
    """

    def __init__(
        self,
        calibration: Path | str,
        test: Path | str,
        classes: Path | str | None = None,
        stored_up: Up = "y",
        num_points: int = 1024,
        sampling: PointSampling = "first",
        sampling_seed: int = 0,
        normalize: Normalize = "unit_sphere",
        up: Up = "y",
        num_calibration: int | None = 512,
        calibration_seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        augment_rotation: float = 10.0,
        augment_scale: float = 0.1,
        augment_jitter: float = 0.01,
        on_corrupt: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        super().__init__(
            num_points,
            sampling,
            sampling_seed,
            normalize,
            up,
            num_calibration,
            calibration_seed,
            batch_size,
            num_workers,
            augment_rotation,
            augment_scale,
            augment_jitter,
            on_corrupt,
        )
        if stored_up not in ("y", "z"):
            raise refuse(f"{KEY}.stored_up", stored_up, "y, z")
        self.calibration, self.test = Path(calibration), Path(test)
        self.classes = None if classes is None else Path(classes)
        self.stored_up = stored_up

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
