"""Carrying features from few points to many."""

from torch import Tensor

from pack_ptq.models.points.gathering import gather_points
from pack_ptq.models.points.knn import knn
from pack_ptq.models.points.operator import one_call

NEIGHBOURS = 3
EPSILON = 1e-8  # keeps the weight of a point that is a query itself finite


def interpolate(queries: Tensor, points: Tensor, features: Tensor) -> Tensor:
    """Average the features of the three nearest points, weighted by inverse squared distance (PointNet++, eq. 2).

    Args:
        queries: Coordinates to compute features for, shape (batch, queries, 3).
        points: Coordinates of the given features, shape (batch, points, 3); 1 or more.
        features: Shape (batch, points, channels).

    Returns:
        Shape (batch, queries, channels).
    """
    return average_by_distance(features, points, queries, knn(queries, points, NEIGHBOURS))


@one_call
def average_by_distance(features: Tensor, points: Tensor, queries: Tensor, index: Tensor) -> Tensor:
    r"""Average the features of chosen points: `f(x) = \sum_i w_i f_i / \sum_i w_i`, `w_i = 1 / (|x - x_i|^2 + 10^-8)`.

    Args:
        features: Shape (batch, points, channels).
        points: Their coordinates, shape (batch, points, 3).
        queries: Coordinates, shape (batch, queries, 3).
        index: Of the chosen points, shape (batch, queries, chosen).

    Returns:
        Shape (batch, queries, channels).
    """
    squared = (gather_points(points, index) - queries[:, :, None]).square().sum(-1)
    weight = 1 / (squared + EPSILON)
    weight = weight / weight.sum(-1, keepdim=True)
    return (gather_points(features, index) * weight[..., None]).sum(2)
