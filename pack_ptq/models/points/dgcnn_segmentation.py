"""DGCNN for part segmentation: Wang et al. 2019, arXiv 1801.07829."""

import torch
from torch import Tensor, nn

from pack_ptq.models.points.alignment import Alignment
from pack_ptq.models.points.append import Append
from pack_ptq.models.points.edge_conv import EdgeConv, leaky_relu
from pack_ptq.models.points.segmentation_head import SegmentationHead
from pack_ptq.models.points.shared_mlp import shared_mlp


class EdgeFeatures(nn.Module):
    """What DGCNN aligns the coordinates by: an edge convolution and a layer over single points.

    Args:
        neighbours: Edges of each point.
    """

    def __init__(self, neighbours: int) -> None:
        super().__init__()
        self.edge_conv = EdgeConv(3, (64, 128), neighbours)
        self.mlp = shared_mlp(nn.Conv1d, (128, 1024), leaky_relu, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map coordinates `(batch, 3, points)` to `(batch, 1024, points)`."""
        return self.mlp(self.edge_conv(x.transpose(1, 2)).transpose(1, 2))


class EdgeAlignment(Alignment):
    """Align coordinates by the features of their edges.

    Args:
        neighbours: Edges of each point.
    """

    def __init__(self, neighbours: int) -> None:
        super().__init__(3, EdgeFeatures(neighbours))

    def forward(self, x: Tensor) -> Tensor:
        """Map coordinates `(batch, points, 3)` to the same shape."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ObjectContext(nn.Module):
    """Give each point features of the whole object and of its category.

    Args:
        num_categories: Kinds of objects.
        in_channels: Features of each point.
    """

    def __init__(self, num_categories: int, in_channels: int) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.fusion = shared_mlp(nn.Conv1d, (in_channels, 1024), leaky_relu, bias=False)
        self.category = shared_mlp(nn.Conv1d, (num_categories, 64), leaky_relu, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, points, num_categories + in_channels)` to `(batch, points, in_channels + 1024 + 64)`."""
        features = x[..., self.num_categories :]
        whole = self.fusion(features.transpose(1, 2)).amax(2)
        category = self.category(x[:, :1, : self.num_categories].transpose(1, 2))[..., 0]
        context = torch.cat([whole, category], 1)[:, None]
        return torch.cat([features, context.expand(-1, x.shape[1], -1)], 2)


class DGCNNSegmentation(nn.Module):
    """A learned alignment, three edge convolutions, and layers that read the features of all and the category.

    Args:
        num_parts: Outputs of each point: the parts of all categories.
        num_categories: Kinds of objects, 1 or more.
        neighbours: Edges of each point.
        dropout: Share of the last hidden features dropped in training, in [0, 1).
    """

    def __init__(
        self, num_parts: int = 50, num_categories: int = 16, neighbours: int = 40, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.alignment = Append(3, EdgeAlignment(neighbours), replace=True)
        self.edge_conv1 = Append(3, EdgeConv(3, (64, 64), neighbours), replace=True)
        self.edge_conv2 = Append(64, EdgeConv(64, (64, 64), neighbours))
        self.edge_conv3 = Append(64, EdgeConv(64, (64,), neighbours))
        self.context = ObjectContext(num_categories, 3 * 64)
        self.head = SegmentationHead((3 * 64 + 1024 + 64, 256, 256, 128), num_parts, dropout, leaky_relu)

    def forward(self, x: Tensor) -> Tensor:
        """Map points with their object's category to scores `(batch, points, num_parts)`.

        Args:
            x: Coordinates in the unit sphere and the category one-hot, the same at each point, shape
                (batch, points, 3 + num_categories).
        """
        x = torch.cat([x[..., 3:], x[..., :3]], 2)  # each layer reads the end
        x = self.edge_conv1(self.alignment(x))
        return self.head(self.context(self.edge_conv3(self.edge_conv2(x))))
