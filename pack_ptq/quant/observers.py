"""Ranges of activations over all calibration batches: first the extremes, then a histogram between them."""

import torch
from torch import Tensor

from pack_ptq.quant.affine import affine_parameters, code_limits, fake_quantize
from pack_ptq.quant.ranges import ERROR_POWER, shrink_factors
from pack_ptq.types import QuantizerSpec

BINS = 2048
SHARES_BELOW = (1.0, 0.75, 0.5, 0.25)  # of what is below 0, whatever is taken of what is above
MOST_COUNTED = 2**24  # histc counts in single precision, which stops there


class ActivationObserver:
    """Extremes in a first pass over the data, a histogram of fixed range in a second one.

    Both merge exactly over batches and processes (minimum, maximum, sum), so the range does not depend on how the
    samples are split. Any width can be asked for afterwards without another pass.
    """

    def __init__(self) -> None:
        self.low = torch.tensor(torch.inf)
        self.high = torch.tensor(-torch.inf)
        self.histogram = torch.zeros(BINS, dtype=torch.float64)

    def see_extremes(self, x: Tensor) -> None:
        """Take one batch of any shape in the first pass."""
        if x.numel():
            low, high = torch.aminmax(x.detach())
            # torch.minimum hands on NaN, so the caller can find it in the end.
            self.low = torch.minimum(self.low.to(low), low)
            self.high = torch.maximum(self.high.to(high), high)

    def see_values(self, x: Tensor) -> None:
        """Take one batch of any shape in the second pass."""
        if x.numel() and self.high > self.low:
            low, high = self.low.item(), self.high.item()
            for part in x.detach().float().flatten().split(MOST_COUNTED):
                self.histogram = self.histogram.to(x.device) + torch.histc(part, BINS, low, high).double()

    def replace(self, values: Tensor, counts: Tensor) -> None:
        """Forget what was seen, for given values and how often each occurred, both of any one shape."""
        values, counts = values.flatten().double(), counts.flatten().double()
        held = values[counts > 0]
        self.low, self.high = (held.min().float(), held.max().float()) if held.numel() else (self.low, self.high)
        width = ((self.high - self.low) / BINS).double().clamp(min=torch.finfo(torch.float64).tiny)
        bins = ((values - self.low) / width).long().clamp_(0, BINS - 1)
        self.histogram = torch.zeros(BINS, dtype=torch.float64, device=values.device).scatter_add_(0, bins, counts)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Give the centers of the histogram's bins and how many values fell into each, float64 on the CPU."""
        low, high = self.low.double().cpu(), self.high.double().cpu()
        if not low < high:  # nothing seen, or a constant
            return low.nan_to_num(posinf=0)[None], torch.ones(1, dtype=torch.float64)
        centers = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * (high - low) / BINS
        return centers, self.histogram.cpu()

    def range(self, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
        """Give the lower and upper end for asymmetric codes of `spec.bits` bits, as scalars on the CPU."""
        low, high = self.low.float().cpu(), self.high.float().cpu()
        if not low < high:  # nothing seen, or a constant
            low, high = torch.nan_to_num(low, posinf=0), torch.nan_to_num(high, neginf=0)
            return low, high
        if spec.observer == "minmax":
            return low, high
        centers, weights = self.counts()
        width = (high - low).double() / BINS
        if spec.observer == "percentile":
            tail = (1 - spec.percentile / 100) / 2
            shares = weights.cumsum(0) / weights.sum()
            first, last = int((shares <= tail).sum()), int((shares < 1 - tail).sum())
            return (low + first * width).float(), (low + (last + 1) * width).float()
        return _smallest_error(low.double(), high.double(), centers, weights, spec.bits)


def _smallest_error(low: Tensor, high: Tensor, centers: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Give the ends with the smallest L2.4 error among shares of both alike, and of each alone.

    What follows GELU or SiLU reaches far up and hardly below 0, where most of it is: shares of both alike would round
    the zero point, and with it all that is negative, to 0.
    """
    factors = shrink_factors().double()[:, None]
    limits = code_limits(bits, signed=False)
    best: tuple[float, Tensor, Tensor] = (torch.inf, low, high)
    highs = high * factors
    for lows in (low * factors, *(low * share * torch.ones_like(factors) for share in SHARES_BELOW if low < 0)):
        scale, zero_point = affine_parameters(lows, highs, bits, symmetric=False)
        errors = (fake_quantize(centers, scale, zero_point, limits) - centers).abs().pow(ERROR_POWER) @ weights
        index = int(errors.argmin())
        if errors[index] < best[0]:
            best = errors[index].item(), lows[index, 0], highs[index, 0]
    return best[1].float(), best[2].float()
