"""What attention probabilities are beside the largest of their row, over all calibration batches."""

import torch
from torch import Tensor

from pack_ptq.quant.affine import code_limits
from pack_ptq.quant.ranges import shrink_factors

BINS = 2048


def row_shares(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Divide every row by its largest value.

    Args:
        x: Values of at least 0, any shape.
        axis: Along which the rows lie.

    Returns:
        Shares in [0, 1] in the shape of `x`, and the largest values, of size 1 along `axis`; rows of zeros stay zeros.
    """
    largest = x.detach().amax(axis, keepdim=True)
    return x / largest.clamp(min=torch.finfo(x.dtype).tiny), largest


class RowObserver:
    """A histogram of the shares, each counted by the square of its row's largest value, which scales its error.

    Args:
        axis: Along which the rows lie: the one that a product sums over.

    Attributes:
        histogram: Shape (2048,) over [0, 1], float64.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.histogram = torch.zeros(BINS, dtype=torch.float64)

    def see_extremes(self, x: Tensor) -> None:
        """Take one batch in the first pass, which has nothing to say here."""

    def see_values(self, x: Tensor) -> None:
        """Take one batch in the second pass."""
        shares, largest = row_shares(x.detach().float(), self.axis)
        bins = (shares * BINS).long().clamp_(0, BINS - 1)
        weights = largest.double().square().expand_as(shares)
        counts = torch.bincount(bins.flatten(), weights.flatten(), minlength=BINS)
        self.histogram = self.histogram.to(x.device) + counts

    def scale(self, bits: int) -> Tensor:
        """Search the scale of the shares with the smallest squared error of the product's operand.

        Args:
            bits: 2 to 8.

        Returns:
            A positive scalar, at most `1 / (2^bits - 1)`, in float32 on the CPU.
        """
        limits = code_limits(bits, signed=False)
        weights = self.histogram.cpu()
        centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
        scales = shrink_factors().double()[:, None] / limits[1]
        codes = (centers / scales).round().clamp(*limits)
        errors = (codes * scales - centers).square() @ weights
        return scales[errors.argmin(), 0].float()
