"""From the features of an object to its scores."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from pack_ptq.models.points.shared_mlp import shared_mlp


class ClassificationHead(nn.Module):
    """Linear layers with BatchNorm, an activation and dropout between them.

    Args:
        channels: Of the input and of each hidden layer.
        num_classes: Outputs.
        dropout: Share of each hidden layer's features dropped in training, in [0, 1).
        activation: After each hidden layer.
        bias: Whether hidden layers have one beside that of BatchNorm.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        dropout: float = 0.5,
        activation: Callable[[], nn.Module] = nn.ReLU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        pairs = pairwise(channels)
        hidden = [shared_mlp(nn.Linear, pair, activation, bias).append(nn.Dropout(dropout)) for pair in pairs]
        self.hidden = nn.Sequential(*hidden)
        self.scores = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels[0])` to scores `(batch, num_classes)`."""
        return self.scores(self.hidden(x))
