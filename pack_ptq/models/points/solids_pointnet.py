"""The embedded networks for point clouds: two narrow PointNets for the solids, shipped with their weights."""

from importlib.resources import as_file, files
from importlib.resources.abc import Traversable

from safetensors.torch import load_file
from torch import nn

from pack_ptq.models.points.pointnet import PointNet
from pack_ptq.models.points.pointnet_segmentation import PointNetSegmentation

CLASSES, PARTS = 20, 40
POINTNET_WEIGHTS = files("pack_ptq.models.points") / "solids_pointnet.safetensors"
PARTNET_WEIGHTS = files("pack_ptq.models.points") / "solids_partnet.safetensors"


class SolidsPointNet(PointNet):
    """PointNet with 32 to 256 features of a point, which tells the 20 solids apart.

    It maps points `(batch, points, 3)` in the unit sphere to scores `(batch, 20)`. `scripts/train_solids.py` makes the
    shipped weights.

    Args:
        pretrained: Load the shipped weights instead of random ones.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__(CLASSES, dropout=0.0, widths=(32, 32, 64, 64, 256, 256, 128))
        if pretrained:
            _load(self, POINTNET_WEIGHTS)


class SolidsPartNet(PointNetSegmentation):
    """PointNet with 32 to 128 features of a point, which tells the 40 parts of the solids apart.

    It maps points with their solid's class one-hot `(batch, points, 3 + 20)` to scores `(batch, points, 40)`.
    `scripts/train_solids.py` makes the shipped weights.

    Args:
        pretrained: Load the shipped weights instead of random ones.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__(PARTS, CLASSES, dropout=0.0, widths=(32, 32, 64, 64, 128, 64, 64, 64))
        if pretrained:
            _load(self, PARTNET_WEIGHTS)


def _load(network: nn.Module, weights: Traversable) -> None:
    with as_file(weights) as file:
        network.load_state_dict(load_file(file))
