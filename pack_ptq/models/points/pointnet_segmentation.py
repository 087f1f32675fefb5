"""PointNet for part segmentation: Qi et al. 2017, arXiv 1612.00593, figure 9."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pack_ptq.models.points.alignment import Alignment
from pack_ptq.models.points.append import Append
from pack_ptq.models.points.segmentation_head import SegmentationHead
from pack_ptq.models.points.shared_mlp import shared_mlp


class PointLayer(nn.Module):
    """One layer over single points, on features that may be aligned first.

    Args:
        in_channels: Features of each point.
        channels: Outputs of each point.
        align: Multiply the features by a learned matrix of the object.
    """

    def __init__(self, in_channels: int, channels: int, align: bool = False) -> None:
        super().__init__()
        self.alignment = Alignment(in_channels) if align else nn.Identity()
        self.mlp = shared_mlp(nn.Conv1d, (in_channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, in_channels)` to `(batch, points, channels)`."""
        return self.mlp(self.alignment(x.transpose(1, 2))).transpose(1, 2)


class PointNetSegmentation(nn.Module):
    """Five layers over single points, and four that read the features of all, of the object and its category.

    Args:
        num_parts: Outputs of each point: the parts of all categories.
        num_categories: Kinds of objects, 1 or more.
        input_transform: With the input T-Net.
        feature_transform: With the feature T-Net, before the fourth layer.
        dropout: Share of the last hidden features dropped in training, in [0, 1).
        widths: Outputs of the five layers and of the three hidden ones of the head.
    """

    def __init__(
        self,
        num_parts: int = 50,
        num_categories: int = 16,
        input_transform: bool = False,
        feature_transform: bool = False,
        dropout: float = 0.3,
        widths: Sequence[int] = (64, 128, 128, 512, 2048, 256, 256, 128),
    ) -> None:
        super().__init__()
        first, second, third, fourth, fifth, *hidden = widths
        self.layer1 = Append(3, PointLayer(3, first, align=input_transform), replace=True)
        self.layer2 = Append(first, PointLayer(first, second))
        self.layer3 = Append(second, PointLayer(second, third))
        self.layer4 = Append(third, PointLayer(third, fourth, align=feature_transform))
        self.layer5 = Append(fourth, PointLayer(fourth, fifth))
        self.width = fifth
        channels = num_categories + sum(widths[:5]) + fifth
        self.head = SegmentationHead((channels, *hidden), num_parts, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map points with their object's category to scores `(batch, points, num_parts)`.

        Args:
            x: Coordinates in the unit sphere and the category one-hot, the same at each point, shape
                (batch, points, 3 + num_categories).
        """
        x = torch.cat([x[..., 3:], x[..., :3]], 2)  # each layer reads the end
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.layer5(self.layer4(x))
        whole = x[..., -self.width :].amax(1, keepdim=True)
        return self.head(torch.cat([x, whole.expand(-1, x.shape[1], -1)], 2))
