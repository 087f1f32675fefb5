"""PointNet for classification: Qi et al. 2017, arXiv 1612.00593."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pack_ptq.models.points.alignment import Alignment


class PointFeatures(nn.Module):
    """Five layers over single points and the maximum over all points.

    Args:
        input_transform: Align the coordinates by a learned 3 x 3 matrix first.
        feature_transform: Align the features after the second layer by a learned matrix.
        widths: Outputs of each layer.
    """

    def __init__(
        self, input_transform: bool, feature_transform: bool, widths: Sequence[int] = (64, 64, 64, 128, 1024)
    ) -> None:
        super().__init__()
        first, second, third, fourth, fifth = widths
        self.input_transform = Alignment(3) if input_transform else nn.Identity()
        self.conv1, self.bn1 = nn.Conv1d(3, first, 1), nn.BatchNorm1d(first)
        self.conv2, self.bn2 = nn.Conv1d(first, second, 1), nn.BatchNorm1d(second)
        self.feature_transform = Alignment(second) if feature_transform else nn.Identity()
        self.conv3, self.bn3 = nn.Conv1d(second, third, 1), nn.BatchNorm1d(third)
        self.conv4, self.bn4 = nn.Conv1d(third, fourth, 1), nn.BatchNorm1d(fourth)
        self.conv5, self.bn5 = nn.Conv1d(fourth, fifth, 1), nn.BatchNorm1d(fifth)

    def forward(self, x: Tensor) -> Tensor:
        """Map coordinates `(batch, 3, points)` to features of the object `(batch, widths[-1])`."""
        x = self.input_transform(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.feature_transform(x)
        x = torch.relu(self.bn3(self.conv3(x)))
        x = torch.relu(self.bn4(self.conv4(x)))
        x = torch.relu(self.bn5(self.conv5(x)))
        return x.amax(2)


class PointNet(nn.Module):
    """Features of single points, their maximum over the object, and three linear layers.

    Its output does not depend on the order of the points. All data passes through every value between two layers, so
    each layer is a block, and so is each alignment.

    Args:
        num_classes: Outputs of the head.
        input_transform: With the input T-Net.
        feature_transform: With the feature T-Net.
        dropout: Share of the last hidden features dropped in training, in [0, 1).
        widths: Outputs of the five layers over points and of the two hidden ones over the object.
    """

    def __init__(
        self,
        num_classes: int = 40,
        input_transform: bool = False,
        feature_transform: bool = False,
        dropout: float = 0.3,
        widths: Sequence[int] = (64, 64, 64, 128, 1024, 512, 256),
    ) -> None:
        super().__init__()
        *over_points, first, second = widths
        self.feature_model = PointFeatures(input_transform, feature_transform, over_points)
        self.linear1, self.bn1 = nn.Linear(over_points[-1], first), nn.BatchNorm1d(first)
        self.linear2, self.bn2 = nn.Linear(first, second), nn.BatchNorm1d(second)
        self.dropout = nn.Dropout(dropout)
        self.linear3 = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map points `(batch, points, 3)` in the unit sphere to scores `(batch, num_classes)`."""
        x = self.feature_model(x.transpose(1, 2))
        x = torch.relu(self.bn1(self.linear1(x)))
        x = torch.relu(self.bn2(self.linear2(x)))
        return self.linear3(self.dropout(x))
