"""DGCNN for classification: Wang et al. 2019, arXiv 1801.07829."""

import torch
from torch import Tensor, nn

from pack_ptq.models.points.append import Append
from pack_ptq.models.points.classification_head import ClassificationHead
from pack_ptq.models.points.edge_conv import EdgeConv, leaky_relu
from pack_ptq.models.points.shared_mlp import shared_mlp


class DGCNN(nn.Module):
    """Four edge convolutions, a layer that reads the features of all, and three linear layers.

    Its output does not depend on the order of the points.

    Args:
        num_classes: Outputs of the head.
        neighbours: Edges of each point.
        dropout: Share of the hidden features of the head dropped in training, in [0, 1).
    """

    def __init__(self, num_classes: int = 40, neighbours: int = 20, dropout: float = 0.5) -> None:
        super().__init__()
        self.edge_conv1 = EdgeConv(3, (64,), neighbours)
        self.edge_conv2 = Append(64, EdgeConv(64, (64,), neighbours))
        self.edge_conv3 = Append(64, EdgeConv(64, (128,), neighbours))
        self.edge_conv4 = Append(128, EdgeConv(128, (256,), neighbours))
        self.fusion = shared_mlp(nn.Conv1d, (512, 1024), leaky_relu, bias=False)
        self.head = ClassificationHead((2048, 512, 256), num_classes, dropout, leaky_relu)

    def forward(self, x: Tensor) -> Tensor:
        """Map points `(batch, points, 3)` in the unit sphere to scores `(batch, num_classes)`."""
        x = self.edge_conv4(self.edge_conv3(self.edge_conv2(self.edge_conv1(x))))
        x = self.fusion(x.transpose(1, 2))
        return self.head(torch.cat([x.amax(2), x.mean(2)], 1))
