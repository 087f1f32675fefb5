"""Choosing points that cover an object evenly."""

import torch
from torch import Tensor

from pack_ptq.models.points.operator import one_call


@one_call
@torch.no_grad()
def farthest_point_sampling(points: Tensor, samples: int, start: int = 0) -> Tensor:
    """Choose points one by one, each the farthest from those chosen before it (Eldar et al. 1997).

    Args:
        points: Coordinates, shape (batch, points, 3).
        samples: How many to choose, 1 or more; fewer are given if there are not so many points.
        start: Index of the first one, so that the choice is the same every time.

    Returns:
        Indices in the order of choice, shape (batch, min(samples, points)); of points equally far, the first. Where
        fewer than `samples` points differ, some are chosen twice.
    """
    axes = points.transpose(1, 2).contiguous()
    batch, _, count = axes.shape
    chosen = torch.full((batch, 1), start, device=points.device)
    nearest = axes.new_full((batch, count), torch.inf)  # squared distance to the nearest chosen point
    order = []
    for _ in range(min(samples, count)):
        order.append(chosen)
        latest = axes.gather(2, chosen[:, None].expand(-1, 3, -1))
        nearest = torch.minimum(nearest, (axes - latest).square().sum(1))
        chosen = nearest.argmax(1, keepdim=True)
    return torch.cat(order, 1)
