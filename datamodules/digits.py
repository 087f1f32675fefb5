"""The embedded default: scikit-learn's handwritten digits, without a download."""

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import Metric

from pack_ptq.datamodules.base import KEY, PTQData
from pack_ptq.datamodules.classification import accuracies, check_num_scores
from pack_ptq.errors import refuse

NUM_CLASSES = 10
TEST_PER_CLASS = 50
TEST_SIZE = NUM_CLASSES * TEST_PER_CLASS
TRAIN_SIZE = 1797 - TEST_SIZE
SPLIT_SEED = 1797
MAX_PIXEL = 16.0


@lru_cache(maxsize=1)
def _splits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    # RandomState, unlike newer generators, promises the same stream in every numpy version; the weights rely on it.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    test = np.concatenate([order[labels[order] == digit][:TEST_PER_CLASS] for digit in range(NUM_CLASSES)])
    train = np.setdiff1d(np.arange(len(labels)), test)
    pixels = images.reshape(-1, 1, 8, 8) / MAX_PIXEL
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    inputs, targets = torch.from_numpy(pixels).float(), torch.from_numpy(labels).long()
    test.sort()
    return inputs[train], targets[train], inputs[test], targets[test]


def train_split() -> tuple[Tensor, Tensor]:
    """Give the 1297 images that the shipped weights were trained on, and from which calibration draws.

    Returns:
        Images `(1297, 1, 8, 8)`, pixels in [0, 1] scaled to mean 0 and standard deviation 1 over this split, and
        labels `(1297,)` in int64.
    """
    inputs, targets, _, _ = _splits()
    return inputs.clone(), targets.clone()


def test_split() -> tuple[Tensor, Tensor]:
    """Give the 500 test images, 50 a digit, none of which is in `train_split`.

    The choice is fixed: no user's seed changes it.

    Returns:
        Images `(500, 1, 8, 8)`, scaled by the constants of the training split, and labels `(500,)` in int64.
    """
    _, _, inputs, targets = _splits()
    return inputs.clone(), targets.clone()


class DigitsData(PTQData):
    """Handwritten digits, 8 x 8 pixels in 10 classes: calibration from the training split, test on the other.

    Args:
        num_calibration: Calibration images, 1 to 1297.
        batch_size: Samples per batch and process, 1 or more.
        num_workers: Loader processes; 0 loads in the main process.
        calibration_seed: Decides which images of the training split calibrate.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self, num_calibration: int = 512, batch_size: int = 64, num_workers: int = 0, calibration_seed: int = 0
    ) -> None:
        super().__init__(batch_size, num_workers)
        if not 1 <= num_calibration <= TRAIN_SIZE:
            raise refuse(f"{KEY}.num_calibration", num_calibration, f"1 to {TRAIN_SIZE}")
        self.num_calibration, self.calibration_seed = num_calibration, calibration_seed

    @property
    def calibration_key(self) -> str:
        """Key that limits the number of calibration images."""
        return f"{KEY}.num_calibration"

    def calibration_dataset(self) -> Dataset:
        """Give the chosen images of the training split, in the order of the draw."""
        inputs, targets = train_split()
        generator = torch.Generator().manual_seed(self.calibration_seed)
        chosen = torch.randperm(TRAIN_SIZE, generator=generator)[: self.num_calibration]
        return TensorDataset(inputs[chosen], targets[chosen])

    def test_dataset(self) -> Dataset:
        """Give the 500 images of the test split."""
        return TensorDataset(*test_split())

    def metrics(self) -> dict[str, Metric]:
        """Give fresh accuracies, `top1` and `top5`."""
        return accuracies(NUM_CLASSES)

    def check_output(self, output: object) -> None:
        """Refuse a network that does not give ten scores.

        Raises:
            UserError: The output is not `(batch, 10)`.
        """
        super().check_output(output)
        check_num_scores(output.shape[1], NUM_CLASSES, "give model a network for digits")  # type: ignore[attr-defined]
