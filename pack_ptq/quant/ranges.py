"""Ranges of weights: extremes, percentile, or the smallest L2.4 error, for every channel at once."""

import torch
from torch import Tensor

from pack_ptq.quant.affine import affine_parameters, code_limits, fake_quantize
from pack_ptq.types import QuantizerSpec

CANDIDATES = 80
ERROR_POWER = 2.4


def shrink_factors(device: torch.device | str = "cpu") -> Tensor:
    """Give the 80 shares of the full range that the MSE search tries: 1.00, 0.99, ... 0.21."""
    return 1 - torch.arange(CANDIDATES, device=device) / 100


def weight_range(rows: Tensor, spec: QuantizerSpec, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Give the range of each row of weights.

    Args:
        rows: Shape (channels, elements); either may be 0.
        spec: Bits and the kind of observer.
        symmetric: Whether codes are signed with zero point 0.

    Returns:
        Lower and upper ends, each of shape (channels, 1).
    """
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0], 1), rows.new_zeros(rows.shape[0], 1)
    if spec.observer == "percentile":
        tail = (100 - spec.percentile) / 200
        return rows.quantile(tail, 1, keepdim=True), rows.quantile(1 - tail, 1, keepdim=True)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if spec.observer == "minmax":
        return low, high
    limits = code_limits(spec.bits, signed=symmetric)
    best_error = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for factor in shrink_factors(rows.device):
        scale, zero_point = affine_parameters(low * factor, high * factor, spec.bits, symmetric)
        error = (fake_quantize(rows, scale, zero_point, limits) - rows).abs_().pow_(ERROR_POWER).sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low, best_high = torch.where(better, low * factor, best_low), torch.where(better, high * factor, best_high)
    return best_low, best_high
