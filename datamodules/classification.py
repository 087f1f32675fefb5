"""What classification data share: the accuracies, and the number of scores that a network must give."""

from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from pack_ptq.errors import UserError

TOP5_FROM_CLASSES = 10


def accuracies(num_classes: int) -> dict[str, Metric]:
    """Give fresh accuracies over all samples: `top1`, and `top5` where there are at least 10 classes.

    Args:
        num_classes: Scores per sample, 2 or more.
    """
    metrics: dict[str, Metric] = {"top1": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes >= TOP5_FROM_CLASSES:
        metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return metrics


def check_num_scores(scores: int, num_classes: int, remedy: str) -> None:
    """Refuse a network whose scores do not belong one to one to the classes.

    Args:
        scores: Second dimension of the network's output.
        num_classes: Classes of the data.
        remedy: What the user can do about it.

    Raises:
        UserError: The numbers differ.
    """
    if scores != num_classes:
        raise UserError(f"the network gives {scores} scores per sample; allowed: {num_classes}, one a class; {remedy}")
