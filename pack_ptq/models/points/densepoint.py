"""DensePoint for classification: Liu et al. 2019, arXiv 1909.03669, with 6 layers, k = 24 and 2 groups."""

import torch
from torch import Tensor, nn

from pack_ptq.models.points.ball_query import ball_query
from pack_ptq.models.points.classification_head import ClassificationHead
from pack_ptq.models.points.densepoint_published import accept_published_weights
from pack_ptq.models.points.gathering import group_points
from pack_ptq.models.points.neighbour_maximum import neighbour_maximum
from pack_ptq.models.points.set_abstraction import GlobalAbstraction, Scale, SetAbstraction

GROWTH = 24
GROUPS = 2


class EnhancedPointConv(nn.Module):
    """A grouped layer over neighbours, their maximum, and a narrow layer whose output is appended.

    Coordinates and all features so far travel as one tensor: all data passes through it, so that each of these is a
    block of its own.

    Args:
        in_channels: Features of each point beside the coordinates.
        radius: Of the ball around each point.
        neighbours: How many points of the ball are seen at most.
        norm_before: BatchNorm and ReLU on the input, as in DenseNet.
        norm_after: The same on the output.
    """

    def __init__(
        self, in_channels: int, radius: float, neighbours: int, norm_before: bool = True, norm_after: bool = False
    ) -> None:
        super().__init__()
        self.radius, self.neighbours = radius, neighbours
        wide, out_channels = 4 * GROWTH, in_channels + GROWTH
        self.before = nn.Sequential(nn.BatchNorm2d(3 + in_channels), nn.ReLU()) if norm_before else nn.Identity()
        self.phi, self.bn = nn.Conv2d(3 + in_channels, wide, 1, groups=GROUPS), nn.BatchNorm2d(wide)
        self.psi, self.dropout = nn.Conv1d(wide, GROWTH, 1), nn.Dropout(0.2)
        self.after = nn.Sequential(nn.BatchNorm1d(out_channels), nn.ReLU()) if norm_after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, 3 + in_channels)` to `(batch, points, 3 + in_channels + 24)`."""
        points, features = x[..., :3], x[..., 3:].transpose(1, 2)
        index = ball_query(points, points, self.radius, self.neighbours)
        y = self.before(group_points(x, points, index))
        y = neighbour_maximum(torch.relu(self.bn(self.phi(y)))).transpose(1, 2)
        y = self.after(torch.cat([features, self.dropout(self.psi(y))], 1))
        return torch.cat([points, y.transpose(1, 2)], 2)


class DensePoint(nn.Module):
    """Two set abstractions of one layer, three densely connected convolutions, one layer on the whole object, a head.

    Published weights load as they are, by the names in `densepoint_published.py`.

    Args:
        num_classes: Outputs of the head.
        dropout: Share of the hidden features of the head dropped in training, in [0, 1).
    """

    def __init__(self, num_classes: int = 40, dropout: float = 0.5) -> None:
        super().__init__()
        self.pool1 = SetAbstraction(0, 512, [Scale(0.25, 64, (96,))])
        self.pool2 = SetAbstraction(96, 128, [Scale(0.32, 64, (93,))])
        self.conv1 = EnhancedPointConv(93, 0.39, 16, norm_before=False)
        self.conv2 = EnhancedPointConv(117, 0.39, 16)
        self.conv3 = EnhancedPointConv(141, 0.39, 16, norm_after=True)
        self.pool3 = GlobalAbstraction(165, (512,))
        self.head = ClassificationHead((512, 512, 256), num_classes, dropout, bias=False)
        self.register_load_state_dict_pre_hook(accept_published_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map points `(batch, points, 3)` in the unit sphere to scores `(batch, num_classes)`."""
        x = self.pool2(self.pool1(x))
        x = self.conv3(self.conv2(self.conv1(x)))
        return self.head(self.pool3(x))
