"""How well the parts of shapes are found, as the ShapeNetPart benchmark measures it."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric


class PartIoU(Metric):
    """Mean intersection over union (mIoU) of shapes, averaged over all shapes or first over each category.

    A point's prediction is the best of its category's parts, the category being known. A shape's IoU is the mean over
    all parts of its category, where a part that is neither there nor predicted counts 1 (Qi et al. 2017).

    Args:
        parts: Number of parts of each category; parts are numbered from 0 on, category after category.
        average: Over `instance`s or over `class`es; categories without a shape do not count.
    """

    full_state_update = False
    higher_is_better = True
    category_of: Tensor
    owns: Tensor
    total: Tensor
    shapes: Tensor

    def __init__(self, parts: Sequence[int], average: Literal["instance", "class"], **settings: Any) -> None:
        super().__init__(**settings)
        self.average, self.num_parts = average, sum(parts)
        category_of = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
        self.register_buffer("category_of", category_of, persistent=False)
        self.register_buffer("owns", category_of == torch.arange(len(parts))[:, None], persistent=False)
        self.add_state("total", torch.zeros(len(parts), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("shapes", torch.zeros(len(parts), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add shapes.

        Args:
            preds: Scores `(batch, n, parts)`.
            target: Parts `(batch, n)`; all of a shape are its category's.
        """
        categories = self.category_of[target[:, 0]]
        own = self.owns[categories]
        found = preds.masked_fill(~own[:, None], -torch.inf).argmax(-1)
        known = torch.arange(self.num_parts, device=target.device)
        predicted, there = found[..., None] == known, target[..., None] == known
        both, either = (predicted & there).sum(1), (predicted | there).sum(1)
        iou = torch.where(either == 0, 1.0, both.double() / either.clamp(min=1))
        of_shape = (iou * own).sum(1) / own.sum(1)
        self.total.index_add_(0, categories, of_shape)
        self.shapes.index_add_(0, categories, torch.ones_like(of_shape))

    def compute(self) -> Tensor:
        """Give the mean, in [0, 1]."""
        if self.average == "instance":
            return self.total.sum() / self.shapes.sum()
        return (self.total / self.shapes)[self.shapes > 0].mean()
