"""Accuracies against counting by hand."""

import pytest
import torch

from pack_ptq.datamodules.classification import accuracies, check_num_scores
from pack_ptq.errors import UserError


def test_accuracies_count_right_samples_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(100, 12, generator=generator)
    # Unbalanced labels tell the average over samples from the average over classes.
    labels = torch.randint(0, 12, (100,), generator=generator).clamp(max=3)
    metrics = accuracies(12)
    for metric in metrics.values():
        metric.update(scores[:70], labels[:70])
        metric.update(scores[70:], labels[70:])
    ranked = scores.argsort(1, descending=True)
    assert metrics["top1"].compute().item() == pytest.approx((ranked[:, 0] == labels).float().mean().item())
    assert metrics["top5"].compute().item() == pytest.approx((ranked[:, :5] == labels[:, None]).any(1).float().mean())


def test_top5_needs_ten_classes() -> None:
    assert set(accuracies(9)) == {"top1"}
    assert set(accuracies(10)) == {"top1", "top5"}


def test_another_number_of_scores_is_refused() -> None:
    check_num_scores(10, 10, "say so")
    with pytest.raises(UserError, match="gives 1000 scores per sample; allowed: 10, one a class; say so"):
        check_num_scores(1000, 10, "say so")
