"""Picking points by their indices."""

import torch.nn.functional as F
from torch import Tensor

from pack_ptq.models.points.operator import one_call


@one_call
def gather_points(x: Tensor, index: Tensor) -> Tensor:
    """Pick points with all their channels.

    Args:
        x: Coordinates, features or both, shape (batch, points, channels).
        index: Of points, shape (batch, ...).

    Returns:
        Shape (batch, ..., channels).
    """
    rows = index.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, rows).unflatten(1, index.shape[1:])


@one_call
def group_points(x: Tensor, centres: Tensor, index: Tensor) -> Tensor:
    """Gather the neighbours of each centre, with their coordinates relative to it, in the layout of `nn.Conv2d`.

    Args:
        x: Coordinates and features, shape (batch, points, 3 + channels).
        centres: Coordinates, shape (batch, centres, 3).
        index: Of the neighbours in `x`, shape (batch, centres, neighbours).

    Returns:
        Shape (batch, 3 + channels, centres, neighbours).
    """
    origins = F.pad(centres, (0, x.shape[-1] - centres.shape[-1]))
    return (gather_points(x, index) - origins[:, :, None]).permute(0, 3, 1, 2)


@one_call
def gather_neighbours(features: Tensor, index: Tensor) -> Tensor:
    """Gather the features of neighbours.

    Args:
        features: Shape (batch, channels, points).
        index: Of the neighbours, shape (batch, queries, neighbours).

    Returns:
        Shape (batch, channels, queries, neighbours).
    """
    return gather_points(features.transpose(1, 2), index).permute(0, 3, 1, 2)
