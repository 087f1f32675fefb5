"""Ranges of every channel of an activation, over all calibration batches."""

import torch
from torch import Tensor

from pack_ptq.quant.affine import affine_parameters, code_limits, fake_quantize
from pack_ptq.quant.ranges import ERROR_POWER, shrink_factors

BINS = 128


class ChannelObserver:
    """Extremes in a first pass over the data, histograms between them in a second; the last axis holds the channels.

    Attributes:
        low: Smallest values, shape (channels,); a scalar before the first batch.
        high: Largest values, likewise.
        histogram: Counts, shape (channels, bins), float64, once the second pass has begun.
    """

    def __init__(self) -> None:
        self.low = torch.tensor(torch.inf)
        self.high = torch.tensor(-torch.inf)
        self.histogram = torch.zeros(())

    def see_extremes(self, x: Tensor) -> None:
        """Take one batch, shape (..., channels), in the first pass."""
        rows = x.detach().float().flatten(0, -2)
        low, high = torch.aminmax(rows, dim=0)
        self.low, self.high = torch.minimum(self.low.to(low), low), torch.maximum(self.high.to(high), high)

    def see_values(self, x: Tensor) -> None:
        """Take one batch, shape (..., channels), in the second pass."""
        rows = x.detach().float().flatten(0, -2)
        channels = rows.shape[1]
        width = ((self.high - self.low) / BINS).clamp(min=torch.finfo(torch.float32).tiny)
        bins = ((rows - self.low) / width).long().clamp_(0, BINS - 1)
        bins += BINS * torch.arange(channels, device=rows.device)
        counts = torch.bincount(bins.flatten(), minlength=channels * BINS)
        self.histogram = self.histogram.to(rows.device) + counts.reshape(channels, BINS).double()

    @property
    def count(self) -> int:
        """Values of each channel that the second pass has seen."""
        return int(self.histogram[0].sum())

    def centers(self) -> Tensor:
        """Give the centers of the bins, shape (channels, bins), float64."""
        low, high = self.low.double(), self.high.double()
        return low[:, None] + (torch.arange(BINS, device=low.device) + 0.5) * ((high - low) / BINS)[:, None]

    def affine(self, bits: int) -> tuple[Tensor, Tensor]:
        """Search scale and zero point of every channel with the smallest L2.4 error.

        Args:
            bits: 2 to 8.

        Returns:
            Scales (positive) and zero points (integers as floats), both of shape (channels,) in float64.
        """
        centers, limits = self.centers(), code_limits(bits, signed=False)
        low, high = self.low.double(), self.high.double()
        scale, zero_point = affine_parameters(low, high, bits, symmetric=False)
        best = torch.full_like(scale, torch.inf)
        for factor in shrink_factors(scale.device).double():
            candidate = affine_parameters(low * factor, high * factor, bits, symmetric=False)
            error = (fake_quantize(centers, candidate[0][:, None], candidate[1][:, None], limits) - centers).abs()
            error = (error.pow(ERROR_POWER) * self.histogram).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero_point = torch.where(better, candidate[0], scale), torch.where(better, candidate[1], zero_point)
        return scale, zero_point
