"""PointNet++'s feature propagation: features of few points carried to many (arXiv 1706.02413)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pack_ptq.models.points.interpolation import interpolate
from pack_ptq.models.points.shared_mlp import shared_mlp


class FeaturePropagation(nn.Module):
    """Layers over single points that read their own features and those interpolated from the coarser level.

    Args:
        fine_channels: Features of each point of the finer level beside the coordinates.
        coarse_channels: The same for the coarser level.
        channels: Outputs of each layer.
    """

    def __init__(self, fine_channels: int, coarse_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.mlp = shared_mlp(nn.Conv1d, (fine_channels + coarse_channels, *channels))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Map `(batch, points, 3 + fine_channels)` and the coarser level to `(batch, points, 3 + channels[-1])`."""
        points = fine[..., :3]
        carried = interpolate(points, coarse[..., :3], coarse[..., 3:])
        features = self.mlp(torch.cat([fine[..., 3:], carried], 2).transpose(1, 2))
        return torch.cat([points, features.transpose(1, 2)], 2)
