"""Curriculum over the calibration rows: from the lowest losses to all of them (AIQViT, METHOD A4)."""

import math

import torch
from torch import Tensor

from pack_ptq.schedules import curriculum_share


class EasyRows:
    """The rows that a step of a fit may draw from.

    Args:
        errors: Loss of every row, shape (rows,); to be set anew when the fit has changed them.
        start: Share of the rows at the first step, in (0, 1].
        steps: Of the fit.
    """

    def __init__(self, errors: Tensor, start: float, steps: int) -> None:
        self.errors, self.start, self.steps = errors, start, steps

    def at(self, step: int, at_least: int) -> Tensor:
        """Give the rows of the lowest losses, at least so many that a batch is whole; shape (chosen rows,)."""
        share = curriculum_share(step, self.steps, self.start)
        count = max(at_least, math.ceil(share * len(self.errors)))
        return torch.argsort(self.errors, stable=True)[:count]
