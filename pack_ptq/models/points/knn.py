"""Nearest neighbours among points or their features."""

import torch
from torch import Tensor

from pack_ptq.models.points.operator import one_call


def distances(queries: Tensor, points: Tensor) -> Tensor:
    """Compute Euclidean distances, exactly for coordinates.

    Args:
        queries: Shape (batch, queries, channels).
        points: Shape (batch, points, channels).

    Returns:
        Shape (batch, queries, points).
    """
    # By |x|^2 - 2 x y + |y|^2 two close points come out at any order; for long features it is five times as fast.
    mode = "use_mm_for_euclid_dist_if_necessary" if queries.shape[-1] > 3 else "donot_use_mm_for_euclid_dist"
    return torch.cdist(queries, points, compute_mode=mode)


@one_call
@torch.no_grad()
def knn(queries: Tensor, points: Tensor, neighbours: int) -> Tensor:
    """Find the nearest points to each query; a query that is a point itself is its own nearest.

    Args:
        queries: Coordinates or features, shape (batch, queries, channels).
        points: Where to search, shape (batch, points, channels).
        neighbours: How many to find, 1 or more; fewer are given if there are not so many points.

    Returns:
        Indices of points from the nearest on, shape (batch, queries, min(neighbours, points)).
    """
    return distances(queries, points).topk(min(neighbours, points.shape[1]), largest=False).indices
