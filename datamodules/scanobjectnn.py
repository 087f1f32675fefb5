"""ScanObjectNN: objects cut from scans of rooms."""

from collections.abc import Sequence
from functools import cached_property

from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.hdf5_clouds import read_hdf5
from pack_ptq.datamodules.point_labels import ClassLabels, PointLabels
from pack_ptq.datamodules.rooted_points import RootedPointData

NAMES = [
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet"
]  # fmt: skip
TRAINING, TEST = "training_", "test_"
USUAL = "training_objectdataset.h5"


class ScanObjectNNData(RootedPointData):
    """ScanObjectNN, 15 classes; needs h5py.

    `root` is a folder such as main_split or main_split_nobg, of which training_objectdataset.h5 and
    test_objectdataset.h5 are read, or the training file of another variant, such as
    training_objectdataset_augmentedrot_scale75.h5, beside which its test file lies. Masks go unread.
    """

    def calibration_clouds(self) -> Sequence[Cloud]:
        """Give the training file's clouds."""
        return self._read(TRAINING)

    def test_clouds(self) -> Sequence[Cloud]:
        """Give the test file's clouds."""
        return self._read(TEST)

    @cached_property
    def labels(self) -> PointLabels:  # type: ignore[override]
        """The classes."""
        return ClassLabels(NAMES)

    def _read(self, split: str) -> Sequence[Cloud]:
        training = self.root if self.root.suffix == ".h5" else self.root / USUAL
        path = training.with_name(training.name.replace(TRAINING, split, 1))
        if not training.name.startswith(TRAINING) or not path.is_file():
            raise self.refuse_root(f"a folder with {USUAL} and {USUAL.replace(TRAINING, TEST)}, or a {TRAINING}*.h5"
                                   f" with its {TEST}*.h5 beside it")  # fmt: skip
        return read_hdf5([path])
