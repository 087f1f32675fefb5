"""Point-cloud benchmarks that lie in a folder in their original layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.cloud import Up
from pack_ptq.datamodules.point_clouds import PointCloudData
from pack_ptq.datamodules.point_preparation import Normalize
from pack_ptq.datamodules.point_sampling import PointSampling
from pack_ptq.errors import UserError, refuse


class RootedPointData(PointCloudData):
    """Point clouds below one folder; a dataset in its own layout is a subclass without an `__init__`.

    Args:
        root: Where the dataset was unpacked.
        num_points: As for `PointCloudData`, and so all that follow.
        sampling: Which points of a larger cloud: `first`, `random` or `farthest`.
        sampling_seed: Of the draws of points.
        normalize: `unit_sphere` or `none`.
        up: Axis that the network takes for upward.
        num_calibration: Calibration clouds from the training split, 1 or more; without it, all there are.
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
        root: Path | str,
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
        self.root = Path(root)

    def refuse_root(self, allowed: str) -> UserError:
        """Word a refusal of the folder, to be raised by the caller."""
        return refuse(f"{KEY}.root", str(self.root), allowed)

    def read_list(self, name: str, read: Callable[[str], object] = str.split) -> list:
        """Read a list that comes with the dataset, such as the names of a split.

        Args:
            name: Of the file below `root`.
            read: From its text to the list; words parted by blanks unless given.

        Raises:
            UserError: The file is missing or has another form.
        """
        path = self.root / name
        try:
            found = read(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.refuse_root(f"a folder with a readable {name} ({error})") from error
        if not isinstance(found, list) or not found:
            raise self.refuse_root(f"a folder whose {name} is a list of one name or more")
        return found
