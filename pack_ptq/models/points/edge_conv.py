"""DGCNN's layer on a graph of neighbours, found anew in each layer's own features (arXiv 1801.07829)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pack_ptq.models.points.gathering import gather_points
from pack_ptq.models.points.knn import knn
from pack_ptq.models.points.neighbour_maximum import neighbour_maximum
from pack_ptq.models.points.operator import one_call
from pack_ptq.models.points.shared_mlp import shared_mlp

leaky_relu = partial(nn.LeakyReLU, 0.2)


@one_call
def edge_features(x: Tensor, index: Tensor) -> Tensor:
    """Describe each edge from a point to a neighbour by their difference and the point: `(x_j - x_i, x_i)`.

    Args:
        x: Features, shape (batch, points, channels).
        index: Of neighbours, shape (batch, points, neighbours).

    Returns:
        Shape (batch, 2 channels, points, neighbours).
    """
    neighbours = gather_points(x, index)
    point = x[:, :, None].expand_as(neighbours)
    return torch.cat([neighbours - point, point], 3).permute(0, 3, 1, 2)


class EdgeConv(nn.Module):
    """Maximum over a point's edges of a perceptron of each edge.

    Args:
        in_channels: Features of each point.
        channels: Outputs of each layer.
        neighbours: Edges of each point, 1 or more.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.mlp = shared_mlp(nn.Conv2d, (2 * in_channels, *channels), leaky_relu, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, in_channels)` to `(batch, points, channels[-1])`."""
        edges = edge_features(x, knn(x, x, self.neighbours))
        return neighbour_maximum(self.mlp(edges))
