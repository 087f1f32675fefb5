"""PointNet's T-Net: a matrix computed from all points, applied to each."""

import torch
from torch import Tensor, nn

from pack_ptq.models.points.shared_mlp import shared_mlp


class Alignment(nn.Module):
    """Multiply each point by a matrix that depends on the object; untrained, it is the identity.

    Args:
        channels: Of each point: 3 for coordinates, or features.
        point_features: Maps `(batch, channels, points)` to `(batch, 1024, points)`; three layers if left out.
    """

    def __init__(self, channels: int, point_features: nn.Module | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.points = point_features or shared_mlp(nn.Conv1d, (channels, 64, 128, 1024))
        self.whole = shared_mlp(nn.Linear, (1024, 512, 256))
        self.matrix = nn.Linear(256, channels * channels)
        nn.init.zeros_(self.matrix.weight)
        with torch.no_grad():
            self.matrix.bias.copy_(torch.eye(channels).flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, points)` to the same shape."""
        matrix = self.matrix(self.whole(self.points(x).amax(2)))
        return matrix.unflatten(1, (self.channels, self.channels)) @ x
