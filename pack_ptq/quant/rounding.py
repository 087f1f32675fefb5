"""AdaRound's soft rounding (arXiv 2004.10568, eq. 23 and 24; METHOD P3)."""

import torch
from torch import Tensor

LOWER, UPPER = -0.1, 1.1


def soft_rounding(v: Tensor) -> Tensor:
    """Give `h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)`, the share by which each weight is rounded up."""
    return (torch.sigmoid(v) * (UPPER - LOWER) + LOWER).clamp(0, 1)


def rounding_start(remainder: Tensor) -> Tensor:
    """Give `v` with `h(v) = remainder`, for remainders in [0, 1]."""
    return torch.logit((remainder - LOWER) / (UPPER - LOWER))


def rounding_penalty(v: Tensor, beta: float) -> Tensor:
    """Give `sum(1 - |2 h(v) - 1|^beta)`, which is 0 when every rounding is settled."""
    return (1 - (2 * soft_rounding(v) - 1).abs().pow(beta)).sum()


def settled(v: Tensor, margin: float = 0.05) -> Tensor:
    """Count the roundings whose `h(v)` is within `margin` of 0 or 1."""
    return ((soft_rounding(v) - 0.5).abs() > 0.5 - margin).sum()
