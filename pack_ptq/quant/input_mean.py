"""What a layer reads on average, and what that makes of errors of its weight (arXiv 1906.04721, section 4.2)."""

import torch
from torch import Tensor, nn


def by_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """Give what a layer reads or gives with one row for every sample and place.

    Args:
        layer: A convolution, whose places are the last axes of `x`, or a linear layer, which has none.
        x: Shape (..., channels, places ...).

    Returns:
        Shape (rows, channels).
    """
    moved = x.movedim(x.ndim - 1 - len(getattr(layer, "kernel_size", ())), -1)
    return moved.reshape(-1, moved.shape[-1])


class InputMean:
    """Sums of every channel over all that a layer reads.

    Args:
        layer: Of the kinds that `by_channel` knows.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        """Take what one call reads, shape (..., channels, places ...)."""
        rows = by_channel(self.layer, x.detach())
        self.total = self.total.to(x.device) + rows.sum(0, dtype=torch.float64)
        self.count = self.count + len(rows)


def mean_output(layer: nn.Module, weight: Tensor, mean: Tensor) -> Tensor:
    """Give what a weight makes of inputs that are their mean everywhere.

    Args:
        layer: A convolution, not a transposed one, or a linear layer.
        weight: In the shape of the layer's own.
        mean: Of its input, shape (input channels,).

    Returns:
        Shape (output channels,); a convolution's padding is not counted.
    """
    groups = getattr(layer, "groups", 1)
    per_channel = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    means = mean.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return (per_channel * means).sum(1)
