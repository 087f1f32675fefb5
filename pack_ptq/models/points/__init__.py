"""Networks for point clouds: points `(batch, points, 3)` in, scores of objects or of points out."""

from pack_ptq.models.points.densepoint import DensePoint
from pack_ptq.models.points.dgcnn import DGCNN
from pack_ptq.models.points.dgcnn_segmentation import DGCNNSegmentation
from pack_ptq.models.points.point_transformer import PointTransformer
from pack_ptq.models.points.point_transformer_segmentation import PointTransformerSegmentation
from pack_ptq.models.points.pointnet import PointNet
from pack_ptq.models.points.pointnet2 import PointNet2
from pack_ptq.models.points.pointnet2_segmentation import PointNet2Segmentation
from pack_ptq.models.points.pointnet_segmentation import PointNetSegmentation
from pack_ptq.models.points.solids_pointnet import SolidsPartNet, SolidsPointNet

__all__ = [
    "DGCNN",
    "DGCNNSegmentation",
    "DensePoint",
    "PointNet",
    "PointNet2",
    "PointNet2Segmentation",
    "PointNetSegmentation",
    "PointTransformer",
    "PointTransformerSegmentation",
    "SolidsPartNet",
    "SolidsPointNet",
]
