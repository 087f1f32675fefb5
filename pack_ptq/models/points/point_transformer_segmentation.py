"""Point Transformer for part segmentation: Zhao et al. 2021, arXiv 2012.09164."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from pack_ptq.models.points.levels import Ascend, Descend
from pack_ptq.models.points.point_transformer import CHANNELS, encoder_stages
from pack_ptq.models.points.point_transformer_block import PointTransformerBlock
from pack_ptq.models.points.segmentation_head import SegmentationHead
from pack_ptq.models.points.transitions import TransitionUp


class UpStage(nn.Module):
    """A transition to the finer level and an attention block.

    Args:
        fine_channels: Features of each point of the finer level beside the coordinates.
        coarse_channels: The same for the coarser level.
        neighbours: Points that each point attends to.
    """

    def __init__(self, fine_channels: int, coarse_channels: int, neighbours: int) -> None:
        super().__init__()
        self.transition = TransitionUp(fine_channels, coarse_channels)
        self.block = PointTransformerBlock(fine_channels, neighbours)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Map `(batch, points, 3 + fine_channels)` and the coarser level to the shape of the finer one."""
        return self.block(self.transition(fine, coarse))


class PointTransformerSegmentation(nn.Module):
    """The encoder of the classifier, a decoder of four stages, and two layers that read the category too.

    Args:
        num_parts: Outputs of each point: the parts of all categories.
        num_categories: Kinds of objects, 1 or more.
        blocks: Attention blocks of each stage of the encoder, 1 or more.
        neighbours: Points that each point attends to.
        dropout: Share of the last hidden features dropped in training, in [0, 1).
    """

    def __init__(
        self,
        num_parts: int = 50,
        num_categories: int = 16,
        blocks: int = 1,
        neighbours: int = 16,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        pairs = list(pairwise(CHANNELS))[::-1]
        self.encoder = nn.ModuleList(Descend(stage) for stage in encoder_stages(blocks, neighbours))
        self.decoder = nn.ModuleList(Ascend(UpStage(*pair, neighbours)) for pair in pairs)
        self.head = SegmentationHead((num_categories + CHANNELS[0], 64), num_parts, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map points with their object's category to scores `(batch, points, num_parts)`.

        Args:
            x: Coordinates in the unit sphere and the category one-hot, the same at each point, shape
                (batch, points, 3 + num_categories).
        """
        levels = [x]
        for stage in (*self.encoder, *self.decoder):
            levels = stage(levels)
        points, features = levels
        return self.head(torch.cat([points[..., 3:], features[..., 3:]], 2))
