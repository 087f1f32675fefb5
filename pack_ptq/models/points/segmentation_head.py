"""From the features of each point to its scores."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pack_ptq.models.points.shared_mlp import shared_mlp


class SegmentationHead(nn.Module):
    """Layers over single points.

    Args:
        channels: Of the input and of each hidden layer.
        num_parts: Outputs of each point.
        dropout: Share of the last hidden features dropped in training, in [0, 1).
        activation: After each hidden layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_parts: int,
        dropout: float = 0.5,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.hidden = shared_mlp(nn.Conv1d, channels, activation)
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Conv1d(channels[-1], num_parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, channels[0])` to scores `(batch, points, num_parts)`."""
        return self.scores(self.dropout(self.hidden(x.transpose(1, 2)))).transpose(1, 2)
