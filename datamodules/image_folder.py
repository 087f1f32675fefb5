"""Images in class folders on disk, for calibration and test."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric

from pack_ptq.datamodules.base import KEY, PTQData
from pack_ptq.datamodules.classification import accuracies, check_num_scores
from pack_ptq.datamodules.image_augmentation import Augmentation, change_images
from pack_ptq.datamodules.image_check import corrupt_files, first_readable
from pack_ptq.datamodules.image_files import ImageFile, ImageFiles
from pack_ptq.datamodules.image_listing import class_folders, first_names, list_images, read_classes
from pack_ptq.datamodules.image_transform import UserPreprocessing, image_transform
from pack_ptq.errors import UserError, refuse
from pack_ptq.types import Preprocessing


class ImageFolderData(PTQData):
    """Images in one sub-folder per class; the calibration folder may also hold unlabelled images directly.

    The calibration images are a seeded random choice without replacement from the sorted files, whatever their class,
    and a smaller choice is the beginning of a larger one. Nothing is read from disk before the samples are asked for.

    Args:
        calibration_dir: Folder of the calibration images.
        test_dir: Folder of the test images, one sub-folder per class.
        classes: File of class names in label order, one a line; without it, the sorted names of the test folders.
        image_size: Height and width in pixels after the crop; without it, the network's own.
        mean: Per channel, for pixel values in [0, 1]; without it, the network's own.
        std: Per channel, above 0, for pixel values in [0, 1]; without it, the network's own.
        crop_ratio: Side of the crop over the shorter side of the resized image, in (0, 1]; without it, the network's
            own, else 1.0.
        interpolation: nearest, bilinear, bicubic or lanczos; without it, the network's own, else bilinear.
        num_calibration: Calibration images, 1 or more; without it, all there are.
        calibration_seed: Decides which images calibrate.
        batch_size: Samples per batch and process, 1 or more.
        num_workers: Loader processes; 0 loads in the main process.
        augmentation: How further views of a calibration image differ from it, for recipes that take several: mirrored,
            moved by up to an eighth of the size, both, or not at all (`none` keeps recipes to one view).
        on_corrupt: Refuse to start with images that cannot be decoded, or skip them (calibration draws others).

    Raises:
        UserError: A value is out of range.
    """

    def __init__(
        self,
        calibration_dir: Path | str,
        test_dir: Path | str,
        classes: Path | str | None = None,
        image_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        crop_ratio: float | None = None,
        interpolation: str | None = None,
        num_calibration: int | None = 1024,
        calibration_seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        augmentation: Augmentation = "flip_shift",
        on_corrupt: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        super().__init__(batch_size, num_workers)
        if num_calibration is not None and num_calibration < 1:
            raise refuse(f"{KEY}.num_calibration", num_calibration, "1 or more, or null for all images")
        if on_corrupt not in ("refuse", "skip"):
            raise refuse(f"{KEY}.on_corrupt", on_corrupt, "refuse or skip")
        if augmentation not in get_args(Augmentation):
            raise refuse(f"{KEY}.augmentation", augmentation, ", ".join(get_args(Augmentation)))
        self.augmentation = augmentation
        self.calibration_dir, self.test_dir = Path(calibration_dir), Path(test_dir)
        self.classes = None if classes is None else Path(classes)
        self.num_calibration, self.calibration_seed = num_calibration, calibration_seed
        self.on_corrupt = on_corrupt
        self.image_size, self.mean, self.std = image_size, mean, std
        self.crop_ratio, self.interpolation = crop_ratio, interpolation
        self.user_preprocessing = UserPreprocessing(image_size, mean, std, crop_ratio, interpolation)
        self.network_preprocessing: Preprocessing | None = None

    def use_preprocessing(self, preprocessing: Preprocessing | None) -> None:
        """Take the network's own wishes for its input; what the user set goes before them."""
        self.network_preprocessing = preprocessing

    def preprocessing(self) -> Preprocessing:
        """Give the preprocessing in force.

        Raises:
            UserError: Neither the user nor the network gives a size, mean or standard deviation.
        """
        return self.user_preprocessing.over(self.network_preprocessing)

    def calibration_dataset(self) -> Dataset:
        """Give the chosen calibration images; the label is -1 where the folder is flat."""
        return ImageFiles(self.calibration_files, image_transform(self.preprocessing()))

    def test_dataset(self) -> Dataset:
        """Give all test images, sorted by path."""
        return ImageFiles(self.test_files, image_transform(self.preprocessing()))

    @property
    def augments(self) -> bool:
        """Whether calibration images have further views."""
        return self.augmentation != "none"

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Mirror and move images, each by a choice of its own."""
        return change_images(inputs, self.augmentation, generator)

    def metrics(self) -> dict[str, Metric]:
        """Give fresh accuracies: `top1`, and `top5` where there are at least 10 classes."""
        return accuracies(len(self.class_names))

    def check_output(self, output: object) -> None:
        """Refuse a network that does not give one score a class.

        Raises:
            UserError: The output is not `(batch, classes)`.
        """
        super().check_output(output)
        scores = output.shape[1]  # type: ignore[attr-defined]
        check_num_scores(scores, len(self.class_names), f"{KEY}.classes names a file with the classes in label order")

    @property
    def calibration_key(self) -> str:
        """Key that limits the number of calibration images."""
        limited = self.num_calibration is not None and len(self.calibration_files) == self.num_calibration
        return f"{KEY}.num_calibration" if limited else f"{KEY}.calibration_dir"

    def check(self) -> None:
        """Refuse folders, classes, numbers or images that cannot serve, before any work starts.

        Calibration images are decoded in full, JPEGs of the test at an eighth of their size.

        Raises:
            UserError: A folder or file is missing or empty, a class is unknown, a preprocessing value is given by
                nobody, the calibration images do not fill one batch, or an image is corrupt.
        """
        self.preprocessing()
        super().check()
        if self.on_corrupt == "refuse":
            self._refuse_corrupt()

    def fingerprint(self) -> str:
        """Give a digest of the calibration files, the test files' names and sizes, classes and preprocessing."""
        calibration = [
            (_name(path, self.calibration_dir), hashlib.sha256(Path(path).read_bytes()).hexdigest())
            for path, _ in self.calibration_files
        ]
        test = [(_name(path, self.test_dir), Path(path).stat().st_size) for path, _ in self.test_files]
        known = [calibration, test, self.class_names, self.preprocessing().to_json()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    @cached_property
    def class_names(self) -> list[str]:
        """Class names in label order, from the file or else from the test folders."""
        if self.classes is not None:
            return read_classes(self.classes)
        names = class_folders(self.test_dir, "test_dir")
        if len(names) < 2:
            allowed = f"a folder with one sub-folder of images per class, two or more unless {KEY}.classes names them"
            raise refuse(f"{KEY}.test_dir", str(self.test_dir), allowed)
        return names

    @cached_property
    def calibration_files(self) -> list[ImageFile]:
        """Paths and labels of the chosen calibration images, in the order of the draw."""
        files = self._list("calibration_dir")
        generator = torch.Generator().manual_seed(self.calibration_seed)
        drawn = [files[index] for index in torch.randperm(len(files), generator=generator).tolist()]
        asked = len(drawn) if self.num_calibration is None else self.num_calibration
        if self.on_corrupt == "skip":
            chosen, corrupt = first_readable(drawn, asked)
            self._warn_skipped("calibration_dir", corrupt)
        else:
            chosen = drawn[:asked]
        if self.num_calibration is not None and len(chosen) < asked:
            rank_zero_warn(
                f"{KEY}.num_calibration is {asked}, but {self.calibration_dir} holds {len(chosen)} usable images:"
                f" all {len(chosen)} are used"
            )
        return chosen

    @cached_property
    def test_files(self) -> list[ImageFile]:
        """Paths and labels of the test images, sorted by path."""
        files = self._list("test_dir")
        if self.on_corrupt == "refuse":
            return files
        corrupt = set(corrupt_files(files, thorough=False))
        self._warn_skipped("test_dir", len(corrupt))
        return [file for file in files if file[0] not in corrupt]

    def _list(self, name: str) -> list[ImageFile]:
        source = f"{KEY}.test_dir ({self.test_dir})" if self.classes is None else f"{KEY}.classes ({self.classes})"
        return list_images(getattr(self, name), name, self.class_names, source)

    def _refuse_corrupt(self) -> None:
        findings = []
        for name, files, thorough in (
            ("calibration_dir", self.calibration_files, True),
            ("test_dir", self.test_files, False),
        ):
            corrupt = corrupt_files(files, thorough)
            if corrupt:
                findings.append(
                    f"{KEY}.{name} has {len(corrupt)} corrupt images of {len(files)}: {first_names(corrupt)}"
                )
        if findings:
            raise UserError(f"{'; '.join(findings)}; repair them, or --{KEY}.on_corrupt skip leaves them out")

    def _warn_skipped(self, name: str, count: int) -> None:
        if count:
            rank_zero_warn(f"{KEY}.{name}: {count} corrupt images are left out")


def _name(path: str, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()
