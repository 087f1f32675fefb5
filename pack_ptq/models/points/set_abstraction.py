"""PointNet++'s set abstraction: fewer points, each with features of its surroundings (arXiv 1706.02413)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pack_ptq.models.points.ball_query import ball_query
from pack_ptq.models.points.farthest_point_sampling import farthest_point_sampling
from pack_ptq.models.points.gathering import gather_points, group_points
from pack_ptq.models.points.neighbour_maximum import neighbour_maximum
from pack_ptq.models.points.shared_mlp import shared_mlp


@dataclass(frozen=True)
class Scale:
    """The surroundings of a centre and the features computed of them.

    Attributes:
        radius: Of the ball, for objects in the unit sphere.
        neighbours: How many points of the ball are seen at most.
        channels: Outputs of each layer.
    """

    radius: float
    neighbours: int
    channels: tuple[int, ...]


class SetAbstraction(nn.Module):
    """A small PointNet on the ball around each of a few centres, once or at several scales.

    Coordinates and features travel as one tensor: all data passes through it, so that a stage is a block of its own.

    Args:
        in_channels: Features of each point that are read, the first ones after the coordinates, 0 or more.
        centres: Points of the output, chosen by farthest-point sampling.
        scales: One for single-scale grouping, several for multi-scale grouping.
    """

    def __init__(self, in_channels: int, centres: int, scales: Sequence[Scale]) -> None:
        super().__init__()
        self.in_channels, self.centres, self.scales = in_channels, centres, tuple(scales)
        mlps = [shared_mlp(nn.Conv2d, (3 + in_channels, *scale.channels)) for scale in scales]
        self.mlps = nn.ModuleList(mlps)
        self.out_channels = sum(scale.channels[-1] for scale in scales)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, 3 + in_channels or more)` to `(batch, centres, 3 + out_channels)`."""
        x = x[..., : 3 + self.in_channels]
        points = x[..., :3]
        centres = gather_points(points, farthest_point_sampling(points, self.centres))
        stages = [centres]
        for scale, mlp in zip(self.scales, self.mlps, strict=True):
            index = ball_query(centres, points, scale.radius, scale.neighbours)
            stages.append(neighbour_maximum(mlp(group_points(x, centres, index))))
        return torch.cat(stages, 2)


class GlobalAbstraction(nn.Module):
    """A small PointNet on all points, coordinates and features.

    Args:
        in_channels: Features of each point beside the coordinates.
        channels: Outputs of each layer.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.mlp = shared_mlp(nn.Conv1d, (3 + in_channels, *channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, 3 + in_channels)` to `(batch, channels[-1])`."""
        return self.mlp(x.transpose(1, 2)).amax(2)
