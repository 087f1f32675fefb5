"""Outlying channels of a linear layer's input as several codes each, so that they do not set the scale of all others.

Transformers have single channels with values hundreds of times as large as all others ("massive activations", arXiv
2402.17762); one scale either clips them or rounds the rest away. A channel with `m` extra codes reaches `m` times
further at the same scale: with `n = 2^bits - 1` and `r = round(x / s) + z` it is the sum of `clip(r - j n, 0, n)` over
its copies `j`, each of which is a plain code of the channel shifted by a constant. So the layer is a larger one with
repeated columns, whose input is gathered and shifted, and what computes it needs nothing new. Channels are repeated as
in outlier channel splitting (arXiv 1901.09504), which halves them instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pack_ptq.quant.affine import affine_parameters, code_limits
from pack_ptq.quant.channel_observer import ChannelObserver
from pack_ptq.quant.ranges import ERROR_POWER

FACTORS = 48
NARROWEST = 2.0**-8  # of the whole range
SHARES_BELOW = (1.0, 0.5)
WORTH = 0.25  # of the error without copies, at most


@dataclass(frozen=True)
class SplitRange:
    """A scale for all channels, and how far single ones reach beyond its codes.

    Attributes:
        scale: A positive scalar.
        zero_point: An integer scalar stored as a float.
        copies: Extra codes below and above, integers stored as floats, shape (2, channels).
    """

    scale: Tensor
    zero_point: Tensor
    copies: Tensor


def search_split(channels: ChannelObserver, bits: int, share: float) -> SplitRange | None:
    """Search the scale, the zero point and the channels to copy with the smallest L2.4 error.

    Args:
        channels: What was seen of every channel.
        bits: 2 to 8.
        share: The largest number of copies over the number of channels, above 0.

    Returns:
        The best, or nothing if copies do not make the error a quarter of what it is without any.
    """
    low, high = channels.low.double(), channels.high.double()
    centers, weights = channels.centers(), channels.histogram
    most = code_limits(bits, signed=False)[1]
    budget = int(share * len(low))
    factors = NARROWEST ** torch.linspace(0, 1, FACTORS, dtype=torch.float64, device=low.device)
    highs, lowest = high.max() * factors, low.min()
    best, plain = None, torch.inf
    error = torch.inf
    for lows in (lowest * factors, *(lowest * part * torch.ones_like(factors) for part in SHARES_BELOW)):
        for scale, zero_point in zip(*affine_parameters(lows, highs, bits, symmetric=False), strict=True):
            codes = (centers / scale).round_().add_(zero_point)
            rounded = _errors(codes, scale, zero_point, centers, weights)
            clipped = _errors(codes.clamp_(0, most), scale, zero_point, centers, weights)
            below = (-((low / scale).round() + zero_point) / most).ceil().clamp(min=0)
            above = (((high / scale).round() + zero_point - most) / most).ceil().clamp(min=0)
            needed, gain = below + above, clipped - rounded
            order = (gain / needed.clamp(min=1)).argsort(descending=True)
            taken = torch.zeros_like(needed, dtype=torch.bool)
            taken[order] = (needed[order].cumsum(0) <= budget) & (needed[order] > 0)
            plain = min(plain, clipped.sum().item())
            total = (clipped.sum() - gain[taken].sum()).item()
            if total < error:
                error = total
                best = SplitRange(scale.float(), zero_point.float(), torch.stack([below, above]).mul(taken).float())
    return best if best is not None and best.copies.any() and error <= WORTH * plain else None


def _errors(codes: Tensor, scale: Tensor, zero_point: Tensor, centers: Tensor, weights: Tensor) -> Tensor:
    return ((codes - zero_point).mul_(scale).sub_(centers).abs_().pow_(ERROR_POWER).mul_(weights)).sum(1)
