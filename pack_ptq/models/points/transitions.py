"""How the Point Transformer goes to fewer points and back: Zhao et al. 2021, arXiv 2012.09164."""

import torch
from torch import Tensor, nn

from pack_ptq.models.points.farthest_point_sampling import farthest_point_sampling
from pack_ptq.models.points.gathering import gather_points, group_points
from pack_ptq.models.points.interpolation import interpolate
from pack_ptq.models.points.knn import knn
from pack_ptq.models.points.neighbour_maximum import neighbour_maximum
from pack_ptq.models.points.shared_mlp import shared_mlp


class PointEmbedding(nn.Module):
    """First features, of the coordinates alone.

    Args:
        channels: Features of each point.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = shared_mlp(nn.Conv1d, (3, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, 3 or more)` to `(batch, points, 3 + channels)`."""
        points = x[..., :3]
        return torch.cat([points, self.mlp(points.transpose(1, 2)).transpose(1, 2)], 2)


class TransitionDown(nn.Module):
    """A quarter of the points, each with the maximum of a layer over its nearest neighbours.

    Args:
        in_channels: Features of each point beside the coordinates.
        channels: Outputs of each point.
        neighbours: Points seen from each point that stays.
    """

    def __init__(self, in_channels: int, channels: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.mlp = shared_mlp(nn.Conv2d, (3 + in_channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, 3 + in_channels)` to `(batch, points / 4, 3 + channels)`, rounded up."""
        points = x[..., :3]
        centres = gather_points(points, farthest_point_sampling(points, -(-points.shape[1] // 4)))
        index = knn(centres, points, self.neighbours)
        features = neighbour_maximum(self.mlp(group_points(x, centres, index)))
        return torch.cat([centres, features], 2)


class TransitionUp(nn.Module):
    """Features interpolated from the coarser level, added to those of the finer one, after one layer each.

    Args:
        fine_channels: Features of each point of the finer level beside the coordinates.
        coarse_channels: The same for the coarser level.
    """

    def __init__(self, fine_channels: int, coarse_channels: int) -> None:
        super().__init__()
        self.fine = shared_mlp(nn.Conv1d, (fine_channels, fine_channels))
        self.coarse = shared_mlp(nn.Conv1d, (coarse_channels, fine_channels))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Map `(batch, points, 3 + fine_channels)` and the coarser level to the shape of the finer one."""
        points = fine[..., :3]
        above = self.coarse(coarse[..., 3:].transpose(1, 2)).transpose(1, 2)
        features = self.fine(fine[..., 3:].transpose(1, 2)).transpose(1, 2)
        return torch.cat([points, features + interpolate(points, coarse[..., :3], above)], 2)
