"""Layers whose outputs are all read at the end, handed on as one growing tensor."""

import torch
from torch import Tensor, nn


class Append(nn.Module):
    """A layer that reads the end of what has been computed so far and appends its output.

    Where the last layers read the features of all layers before, data flows past each of them. In one tensor that
    grows, all data passes through one value after each layer, so that each layer is a block of its own.

    Args:
        in_channels: How many channels the layer reads, the last ones of the input.
        layer: Maps `(batch, points, in_channels)` to `(batch, points, channels)`.
        replace: Put the output in the place of what was read, for nothing else needs that.
    """

    def __init__(self, in_channels: int, layer: nn.Module, replace: bool = False) -> None:
        super().__init__()
        self.in_channels, self.layer, self.replace = in_channels, layer, replace

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, in_channels or more)` to `channels` more, or so many for the ones that were read."""
        kept = x[..., : -self.in_channels] if self.replace else x
        return torch.cat([kept, self.layer(x[..., -self.in_channels :])], 2)
