"""PointNet++ for classification: Qi et al. 2017, arXiv 1706.02413."""

from typing import Literal

from torch import Tensor, nn

from pack_ptq.models.points.classification_head import ClassificationHead
from pack_ptq.models.points.set_abstraction import GlobalAbstraction, Scale, SetAbstraction

SINGLE_SCALE = (
    (512, [Scale(0.2, 32, (64, 64, 128))]),
    (128, [Scale(0.4, 64, (128, 128, 256))]),
)
MULTI_SCALE = (
    (512, [Scale(0.1, 16, (32, 32, 64)), Scale(0.2, 32, (64, 64, 128)), Scale(0.4, 128, (64, 96, 128))]),
    (128, [Scale(0.2, 32, (64, 64, 128)), Scale(0.4, 64, (128, 128, 256)), Scale(0.8, 128, (128, 128, 256))]),
)
STAGES = {"single": SINGLE_SCALE, "multi": MULTI_SCALE}


class PointNet2(nn.Module):
    """Two set abstractions, one over the whole object, and three linear layers.

    Args:
        num_classes: Outputs of the head.
        grouping: One ball around each centre (SSG) or three of different sizes (MSG).
        dropout: Share of the hidden features of the head dropped in training, in [0, 1).
    """

    def __init__(
        self, num_classes: int = 40, grouping: Literal["single", "multi"] = "single", dropout: float = 0.5
    ) -> None:
        super().__init__()
        (centres1, scales1), (centres2, scales2) = STAGES[grouping]
        self.abstraction1 = SetAbstraction(0, centres1, scales1)
        self.abstraction2 = SetAbstraction(self.abstraction1.out_channels, centres2, scales2)
        self.abstraction3 = GlobalAbstraction(self.abstraction2.out_channels, (256, 512, 1024))
        self.head = ClassificationHead((1024, 512, 256), num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map points `(batch, points, 3)` in the unit sphere to scores `(batch, num_classes)`."""
        x = self.abstraction2(self.abstraction1(x))
        return self.head(self.abstraction3(x))
