"""Points within a radius."""

import torch
from torch import Tensor

from pack_ptq.models.points.knn import distances
from pack_ptq.models.points.operator import one_call


@one_call
@torch.no_grad()
def ball_query(centres: Tensor, points: Tensor, radius: float, neighbours: int) -> Tensor:
    """Find points nearer than a radius to each centre: the first ones by index, as in PointNet++ (Qi et al. 2017).

    Args:
        centres: Coordinates, shape (batch, centres, 3).
        points: Where to search, shape (batch, points, 3).
        radius: Of the ball, in the units of the coordinates, above 0.
        neighbours: How many to give, 1 or more; fewer if there are not so many points.

    Returns:
        Indices of points, ascending, shape (batch, centres, min(neighbours, points)). Where a ball holds fewer, its
        first one fills up; an empty ball gives point 0.
    """
    count = points.shape[1]
    index = torch.arange(count, device=points.device, dtype=torch.int32)  # half the work of int64 for topk
    inside = torch.where(distances(centres, points) < radius, index, count)
    first = inside.topk(min(neighbours, count), largest=False).values.long()
    first = torch.where(first < count, first, first[..., :1])
    return torch.where(first < count, first, 0)
