"""Point Transformer for classification: Zhao et al. 2021, arXiv 2012.09164."""

from itertools import pairwise

from torch import Tensor, nn

from pack_ptq.models.points.classification_head import ClassificationHead
from pack_ptq.models.points.point_transformer_block import PointTransformerBlock
from pack_ptq.models.points.transitions import PointEmbedding, TransitionDown

CHANNELS = (32, 64, 128, 256, 512)


def encoder_stages(blocks: int, neighbours: int) -> list[nn.Sequential]:
    """Give the five stages, from all points to one in 256, each of which changes the points and then attends."""
    pairs = pairwise(CHANNELS)
    transitions = [PointEmbedding(CHANNELS[0]), *[TransitionDown(*pair, neighbours) for pair in pairs]]
    return [
        nn.Sequential(transition, *[PointTransformerBlock(channels, neighbours) for _ in range(blocks)])
        for transition, channels in zip(transitions, CHANNELS, strict=True)
    ]


class PointTransformer(nn.Module):
    """Five stages of vector attention with 32 to 512 channels, the mean over the points and three linear layers.

    Args:
        num_classes: Outputs of the head.
        blocks: Attention blocks of each stage, 1 or more.
        neighbours: Points that each point attends to.
        dropout: Share of the hidden features of the head dropped in training, in [0, 1).
    """

    def __init__(self, num_classes: int = 40, blocks: int = 1, neighbours: int = 16, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*encoder_stages(blocks, neighbours))
        self.head = ClassificationHead((512, 256, 128), num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map points `(batch, points, 3)` in the unit sphere to scores `(batch, num_classes)`."""
        return self.head(self.encoder(x)[..., 3:].mean(1))
