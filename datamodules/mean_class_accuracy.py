"""The accuracy of each class, averaged over the classes that the test has."""

from torch import Tensor
from torchmetrics.classification import MulticlassStatScores


class MeanClassAccuracy(MulticlassStatScores):
    """Mean over classes of the share of their samples that is right.

    torchmetrics' own macro average counts a class without any sample as 0 once it is predicted.

    Args:
        num_classes: Scores per sample, 2 or more.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    def compute(self) -> Tensor:
        """Give the mean, in [0, 1]."""
        right, _, _, missed = self._final_state()
        samples = right + missed
        return (right / samples)[samples > 0].mean()
