"""What a layer reads on average, and what that makes of errors of its weight (arXiv 1906.04721, section 4.2)."""

import torch
from torch import Tensor, nn


class InputMean:
    """Sums of every channel over all that a layer reads.

    Args:
        layer: A convolution, whose channels are the second axis of its input, or a linear layer, where they are last.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.is_linear = isinstance(layer, nn.Linear)
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        """Take what one call reads, shape (batch, channels, ...) or (..., channels)."""
        x = x.detach()
        channels = x.shape[-1] if self.is_linear else x.shape[1]
        axes = list(range(x.ndim - 1)) if self.is_linear else [0, *range(2, x.ndim)]
        self.total = self.total.to(x.device) + x.sum(axes, dtype=torch.float64)
        self.count = self.count + x.numel() // channels


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
