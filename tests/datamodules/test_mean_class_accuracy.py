"""Mean-class accuracy against counting by hand."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from pack_ptq.datamodules.mean_class_accuracy import MeanClassAccuracy


def test_classes_weigh_the_same_and_absent_ones_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 80 + [1] * 15 + [3] * 5)
    scores = torch.randn(100, 6, generator=generator)
    scores[torch.arange(100), labels] += 1
    predicted = scores.argmax(1)
    expected = sum((predicted[labels == c] == c).double().mean().item() for c in (0, 1, 3)) / 3
    metric, macro = MeanClassAccuracy(6), MulticlassAccuracy(6, average="macro")
    for part in (slice(0, 70), slice(70, 100)):
        metric.update(scores[part], labels[part])
        macro.update(scores[part], labels[part])
    assert metric.compute().item() == pytest.approx(expected)
    assert macro.compute().item() < 0.6 * expected, "otherwise torchmetrics' own would do"


def test_bounds() -> None:
    metric = MeanClassAccuracy(3)
    metric.update(torch.eye(3), torch.arange(3))
    assert metric.compute() == 1
    metric.reset()
    metric.update(torch.eye(3), torch.tensor([1, 2, 0]))
    assert metric.compute() == 0
