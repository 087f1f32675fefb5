"""What every source of point clouds shares: a seeded choice, preparation, refusals by name, further views."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric

from pack_ptq.datamodules.base import KEY, PTQData
from pack_ptq.datamodules.cloud import Cloud, Up
from pack_ptq.datamodules.image_listing import first_names
from pack_ptq.datamodules.point_augmentation import PointAugmentation
from pack_ptq.datamodules.point_labels import PointLabels
from pack_ptq.datamodules.point_preparation import Normalize, PointPreparation
from pack_ptq.datamodules.point_sampling import PointSampling
from pack_ptq.datamodules.prepared_clouds import PreparedClouds, prepare_clouds
from pack_ptq.errors import UserError, refuse

WIDE = 1000.0  # ratio of radii from which one range for all clouds cannot serve


@dataclass(eq=False, kw_only=True)
class PointCloudData(PTQData):
    """Point clouds, prepared once and kept in memory.

    A new dataset is a subclass with two methods and a metric: `calibration_clouds`, `test_clouds`, and `labels`, which
    brings the metrics; `metrics` adds others. Inputs are `(n, 3)` in float32, or with a one-hot category
    `(n, 3 + categories)` for parts. A subclass with settings of its own is a dataclass too, and keeps these.

    Attributes:
        num_points: Points of a sample, 1 or more; a cloud with fewer gives some of them again.
        sampling: Which points of a larger cloud: its first ones, a random draw, or farthest-point sampling.
        sampling_seed: Of these draws and of those on meshes, 0 to 2^32 - 1.
        normalize: Move the mean of a cloud to the origin and its farthest point to distance 1, or leave it.
        up: Axis that the network takes for upward; clouds stored otherwise are turned.
        num_calibration: Calibration clouds, 1 or more; without it, all there are.
        calibration_seed: Decides which clouds calibrate.
        batch_size: Samples per batch and process, 1 or more.
        num_workers: Processes that read, prepare and load; 0 does so in the main process.
        augment_rotation: Largest turn of a further view about the upward axis, in degrees, 0 to 180.
        augment_scale: Largest change of its size, as a share of it, 0 up to but not including 1.
        augment_jitter: Standard deviation of its noise, in units of the prepared cloud, 0 or more.
        on_corrupt: Refuse to start with clouds that cannot serve, or skip them (calibration draws others).

    Raises:
        UserError: A value is out of range.
    """

    num_points: int = 1024
    sampling: PointSampling = "first"
    sampling_seed: int = 0
    normalize: Normalize = "unit_sphere"
    up: Up = "y"
    num_calibration: int | None = 512
    calibration_seed: int = 0
    batch_size: int = 32
    num_workers: int = 0
    augment_rotation: float = 10.0
    augment_scale: float = 0.1
    augment_jitter: float = 0.01
    on_corrupt: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        super().__init__(self.batch_size, self.num_workers)
        if self.num_calibration is not None and self.num_calibration < 1:
            raise refuse(f"{KEY}.num_calibration", self.num_calibration, "1 or more, or null for all clouds")
        if self.on_corrupt not in ("refuse", "skip"):
            raise refuse(f"{KEY}.on_corrupt", self.on_corrupt, "refuse or skip")
        self.preparation = PointPreparation(self.num_points, self.sampling, self.sampling_seed, self.normalize, self.up)
        self.augmentation = PointAugmentation(self.augment_rotation, self.augment_scale, self.augment_jitter)

    @abstractmethod
    def calibration_clouds(self) -> Sequence[Cloud]:
        """Give all clouds that may calibrate, in a fixed order."""

    @abstractmethod
    def test_clouds(self) -> Sequence[Cloud]:
        """Give the test clouds, each with a label."""

    @property
    @abstractmethod
    def labels(self) -> PointLabels:
        """What the labels mean."""

    def metrics(self) -> dict[str, Metric]:
        """Give fresh metrics: accuracies for classes, mIoUs for parts."""
        return self.labels.metrics()

    def task_loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Compute the cross-entropy of every cloud."""
        return self.labels.loss(output, label)

    def check_output(self, output: object) -> None:
        """Refuse a network whose output does not fit the labels.

        Raises:
            UserError: The output has another form.
        """
        self.labels.check_output(output, self.num_points)

    @property
    def calibration_key(self) -> str:
        """Key that limits the number of calibration clouds."""
        return f"{KEY}.num_calibration"

    @property
    def augments(self) -> bool:
        """Whether calibration clouds have further views."""
        return self.augmentation.changes

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Turn, scale and jitter clouds, each by choices of its own."""
        return self.augmentation.change(inputs, self.up, generator)

    def calibration_dataset(self) -> Dataset:
        """Give the chosen clouds, in the order of the draw; a smaller choice is the beginning of a larger one."""
        return self._calibration

    def test_dataset(self) -> Dataset:
        """Give all test clouds, in their source's order."""
        return self._test

    def check(self) -> None:
        """Read and prepare all clouds, and refuse what cannot serve; warn of scales that no range can hold.

        Raises:
            UserError: A file is missing, clouds cannot serve, or there are too few.
        """
        super().check()
        radii = self._calibration.points.norm(dim=2).amax(1)
        if self.normalize == "none" and radii.max() > WIDE * radii.min():
            rank_zero_warn(
                f"{KEY}.normalize is 'none', and the clouds' extents go from {radii.min():.3g} to {radii.max():.3g}:"
                " few bits cannot hold both; unit_sphere brings them to one scale"
            )

    def fingerprint(self) -> str:
        """Give a digest of all prepared clouds and their labels."""
        digest = hashlib.sha256("/".join(self.labels.names).encode())
        for clouds in (self._calibration, self._test):
            digest.update(str(clouds.classes).encode())
            for part in (clouds.points, clouds.parts):
                digest.update(b"" if part is None else part.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _calibration(self) -> PreparedClouds:
        source = self.calibration_clouds()
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(self.calibration_seed)).tolist()
        asked = len(order) if self.num_calibration is None else self.num_calibration
        clouds: list[Cloud] = []
        failures: list[str] = []
        # What is skipped is made up for by further draws.
        while order and len(clouds) < asked and not (failures and self.on_corrupt == "refuse"):
            drawn, order = order[: asked - len(clouds)], order[asked - len(clouds) :]
            more, failed = self._prepare(source, drawn, needs_label=False)
            clouds, failures = clouds + more, failures + failed
        if self.num_calibration is not None and len(clouds) < asked and not failures:
            rank_zero_warn(
                f"{KEY}.num_calibration is {asked}, but there are {len(clouds)} clouds: all {len(clouds)} are used"
            )
        return self._serve("calibration", clouds, failures)

    @cached_property
    def _test(self) -> PreparedClouds:
        source = self.test_clouds()
        return self._serve("test", *self._prepare(source, range(len(source)), needs_label=True))

    def _prepare(
        self, source: Sequence[Cloud], indices: Sequence[int], needs_label: bool
    ) -> tuple[list[Cloud], list[str]]:
        return prepare_clouds(source, indices, self.preparation, self.labels, needs_label, self.num_workers)

    def _serve(self, name: str, clouds: list[Cloud], failures: list[str]) -> PreparedClouds:
        found = f"data has {len(failures)} {name} clouds of {len(clouds) + len(failures)} that cannot serve"
        if failures and self.on_corrupt == "refuse":
            raise UserError(
                f"{found}: {first_names(failures)}; repair them, or --{KEY}.on_corrupt skip leaves them out"
            )
        if not clouds:
            raise UserError(
                f"data has 0 {name} clouds{': ' + first_names(failures) if failures else ''}; allowed: 1 or more"
            )
        if failures:
            rank_zero_warn(f"{found} and are left out: {first_names(failures)}")
        return PreparedClouds(clouds, self.labels)
