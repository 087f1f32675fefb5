"""mIoU of parts against a plain loop over the benchmark's definition."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from pack_ptq.datamodules.part_iou import PartIoU

PARTS = [4, 2, 1, 6, 3]
STARTS = np.cumsum([0, *PARTS])
NAMES: list[Any] = ["instance", "class"]


def shapes(count: int, points: int = 30, seed: int = 0, categories: tuple[int, ...] = (0, 1, 2, 3)) -> tuple:
    """Draw scores and parts; many shapes lack parts, and one category is never there."""
    random = np.random.RandomState(seed)
    of_shape = random.choice(categories, count)
    target = np.stack([random.choice(np.arange(STARTS[c], STARTS[c + 1])[: random.randint(1, 7)], points)
                       for c in of_shape])  # fmt: skip
    scores = random.standard_normal((count, points, sum(PARTS)))
    np.put_along_axis(scores, target[..., None], np.take_along_axis(scores, target[..., None], 2) + 1.5, 2)
    return torch.from_numpy(scores).float(), torch.from_numpy(target)


def oracle(scores: Tensor, target: Tensor) -> dict[str, float]:
    """Follow the published evaluation line by line."""
    by_category: dict[int, list[float]] = {}
    for shape_scores, parts in zip(scores.numpy(), target.numpy(), strict=True):
        category = int(np.searchsorted(STARTS, parts[0], "right")) - 1
        own = range(STARTS[category], STARTS[category + 1])
        predicted = shape_scores[:, own.start : own.stop].argmax(1) + own.start
        ious = []
        for part in own:
            there, found = parts == part, predicted == part
            absent = there.sum() == 0 and found.sum() == 0
            ious.append(1.0 if absent else (there & found).sum() / float((there | found).sum()))
        by_category.setdefault(category, []).append(float(np.mean(ious)))
    return {
        "instance": float(np.mean([iou for ious in by_category.values() for iou in ious])),
        "class": float(np.mean([np.mean(ious) for ious in by_category.values()])),
    }


@pytest.mark.parametrize("average", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_loop(average: Literal["instance", "class"], seed: int) -> None:
    scores, target = shapes(60, seed=seed)
    metric = PartIoU(PARTS, average)
    for part in (slice(0, 25), slice(25, 26), slice(26, 60)):
        metric.update(scores[part], target[part])
    assert metric.compute().item() == pytest.approx(oracle(scores, target)[average], abs=1e-12)


def test_by_hand() -> None:
    # Two shapes of the category with two parts: one has the first part only, and it is found whole.
    target = torch.tensor([[4, 4, 4, 4], [4, 4, 5, 5]])
    scores = torch.zeros(2, 4, sum(PARTS))
    scores[..., 0] = 9  # of another category, which does not count
    scores[0, :, 4] = 1
    scores[1, :, 5] = torch.tensor([-1.0, 1, 1, 1])
    metric = PartIoU(PARTS, "instance")
    metric.update(scores, target)
    assert metric.compute().item() == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric PartIoU was called before")
def test_both_in_one_collection_and_merged_over_processes() -> None:
    scores, target = shapes(40)
    halves = [MetricCollection({name: PartIoU(PARTS, name) for name in NAMES}) for _ in range(2)]
    for half, part in zip(halves, (slice(0, 15), slice(15, 40)), strict=True):
        half.update(scores[part], target[part])
    for name, expected in oracle(scores, target).items():
        assert halves[0].compute()[name] != pytest.approx(expected, abs=1e-6)
        whole = PartIoU(PARTS, name)  # type: ignore[arg-type]
        whole.total = sum(half[name].total for half in halves)  # type: ignore[assignment]
        whole.shapes = sum(half[name].shapes for half in halves)  # type: ignore[assignment]
        assert whole.compute().item() == pytest.approx(expected)


def test_perfect_is_one() -> None:
    _, target = shapes(20)
    metric = PartIoU(PARTS, "class")
    metric.update(torch.nn.functional.one_hot(target, sum(PARTS)).float(), target)
    assert metric.compute() == 1
