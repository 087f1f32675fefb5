"""The residual block of the Point Transformer: Zhao et al. 2021, arXiv 2012.09164."""

import torch
from torch import Tensor, nn

from pack_ptq.models.points.vector_attention import VectorAttention


class PointTransformerBlock(nn.Module):
    """Vector attention between two layers over single points, beside a shortcut.

    Coordinates and features travel as one tensor: all data passes through it, so that a block is a block of the chain.

    Args:
        channels: Features of each point beside the coordinates.
        neighbours: Points that each point attends to.
    """

    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(channels, channels, 1), nn.BatchNorm1d(channels)
        self.attention, self.bn2 = VectorAttention(channels, neighbours), nn.BatchNorm1d(channels)
        self.conv3, self.bn3 = nn.Conv1d(channels, channels, 1), nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, 3 + channels)` to the same shape; the coordinates stay."""
        points, features = x[..., :3], x[..., 3:].transpose(1, 2)
        y = torch.relu(self.bn1(self.conv1(features)))
        y = torch.relu(self.bn2(self.attention(points, y)))
        y = torch.relu(features + self.bn3(self.conv3(y)))
        return torch.cat([points, y.transpose(1, 2)], 2)
