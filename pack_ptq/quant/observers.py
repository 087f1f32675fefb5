"""Ranges of activations over all calibration batches: first the extremes, then a histogram between them."""

import torch
from torch import Tensor

from pack_ptq.quant.affine import affine_parameters, code_limits, fake_quantize
from pack_ptq.quant.ranges import ERROR_POWER, shrink_factors
from pack_ptq.types import QuantizerSpec

BINS = 2048
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

    def range(self, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
        """Give the lower and upper end for asymmetric codes of `spec.bits` bits, as scalars on the CPU."""
        low, high = self.low.float().cpu(), self.high.float().cpu()
        if not low < high:  # nothing seen, or a constant
            low, high = torch.nan_to_num(low, posinf=0), torch.nan_to_num(high, neginf=0)
            return low, high
        if spec.observer == "minmax":
            return low, high
        weights = self.histogram.cpu()
        width = (high - low).double() / BINS
        centers = low.double() + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width
        if spec.observer == "percentile":
            tail = (1 - spec.percentile / 100) / 2
            shares = weights.cumsum(0) / weights.sum()
            first, last = int((shares <= tail).sum()), int((shares < 1 - tail).sum())
            return (low + first * width).float(), (low + (last + 1) * width).float()
        factors = shrink_factors().double()[:, None]
        lows, highs = low.double() * factors, high.double() * factors
        scale, zero_point = affine_parameters(lows, highs, spec.bits, symmetric=False)
        limits = code_limits(spec.bits, signed=False)
        errors = (fake_quantize(centers, scale, zero_point, limits) - centers).abs().pow(ERROR_POWER) @ weights
        best = int(errors.argmin())
        return lows[best, 0].float(), highs[best, 0].float()
