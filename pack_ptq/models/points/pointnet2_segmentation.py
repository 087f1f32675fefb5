"""PointNet++ with single-scale grouping for part segmentation: Qi et al. 2017, arXiv 1706.02413."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.models.points.feature_propagation import FeaturePropagation
from pack_ptq.models.points.levels import Ascend, Descend
from pack_ptq.models.points.segmentation_head import SegmentationHead
from pack_ptq.models.points.set_abstraction import GlobalAbstraction, Scale, SetAbstraction


class WholeObject(GlobalAbstraction):
    """The coarsest level: one point at the origin."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, 3 + in_channels)` to `(batch, 1, 3 + channels[-1])`."""
        return F.pad(super().forward(x)[:, None], (3, 0))


class PointNet2Segmentation(nn.Module):
    """Three set abstractions, three feature propagations, and two layers over single points.

    Args:
        num_parts: Outputs of each point: the parts of all categories.
        num_categories: Kinds of objects, 1 or more.
        dropout: Share of the last hidden features dropped in training, in [0, 1).
    """

    def __init__(self, num_parts: int = 50, num_categories: int = 16, dropout: float = 0.5) -> None:
        super().__init__()
        abstractions = (
            SetAbstraction(0, 512, [Scale(0.2, 32, (64, 64, 128))]),
            SetAbstraction(128, 128, [Scale(0.4, 64, (128, 128, 256))]),
            WholeObject(256, (256, 512, 1024)),
        )
        propagations = (
            FeaturePropagation(256, 1024, (256, 256)),
            FeaturePropagation(128, 256, (256, 128)),
            FeaturePropagation(3 + num_categories, 128, (128, 128, 128)),
        )
        self.encoder = nn.ModuleList(Descend(stage) for stage in abstractions)
        self.decoder = nn.ModuleList(Ascend(stage) for stage in propagations)
        self.head = SegmentationHead((128, 128), num_parts, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map points with their object's category to scores `(batch, points, num_parts)`.

        Args:
            x: Coordinates in the unit sphere and the category one-hot, the same at each point, shape
                (batch, points, 3 + num_categories).
        """
        levels = [torch.cat([x[..., :3], x], 2)]  # the finest level has coordinates and category as its features
        for stage in (*self.encoder, *self.decoder):
            levels = stage(levels)
        return self.head(levels[0][..., 3:])
