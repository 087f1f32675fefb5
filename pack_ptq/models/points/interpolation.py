"""Carrying features from few points to many."""

from torch import Tensor

from pack_ptq.models.points.gathering import gather_points
from pack_ptq.models.points.knn import distances
from pack_ptq.models.points.operator import one_call

NEIGHBOURS = 3
EPSILON = 1e-8  # keeps the weight of a point that is a query itself finite


@one_call
def interpolate(queries: Tensor, points: Tensor, features: Tensor) -> Tensor:
    r"""Average the features of the three nearest points, weighted by inverse squared distance (PointNet++, eq. 2).

    `f(x) = \sum_i w_i f_i / \sum_i w_i` with `w_i = 1 / (d(x, x_i)^2 + 10^-8)`.

    Args:
        queries: Coordinates to compute features for, shape (batch, queries, 3).
        points: Coordinates of the given features, shape (batch, points, 3); 1 or more.
        features: Shape (batch, points, channels).

    Returns:
        Shape (batch, queries, channels).
    """
    distance, index = distances(queries, points).topk(min(NEIGHBOURS, points.shape[1]), largest=False)
    weight = 1 / (distance.square() + EPSILON)
    weight = weight / weight.sum(-1, keepdim=True)
    return (gather_points(features, index) * weight[..., None]).sum(2)
