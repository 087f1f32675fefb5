"""Where networks come from."""

from pack_ptq.models.cifar_resnet import CifarResNet
from pack_ptq.models.digits_resnet import DigitsResNet
from pack_ptq.models.digits_vit import DigitsViT
from pack_ptq.models.loaded import LoadedModel
from pack_ptq.models.points import (
    DGCNN,
    DensePoint,
    DGCNNSegmentation,
    PointNet,
    PointNet2,
    PointNet2Segmentation,
    PointNetSegmentation,
    PointTransformer,
    PointTransformerSegmentation,
    SolidsPartNet,
    SolidsPointNet,
)
from pack_ptq.models.source import ModelSource, load_model

__all__ = [
    "DGCNN",
    "CifarResNet",
    "DGCNNSegmentation",
    "DensePoint",
    "DigitsResNet",
    "DigitsViT",
    "LoadedModel",
    "ModelSource",
    "PointNet",
    "PointNet2",
    "PointNet2Segmentation",
    "PointNetSegmentation",
    "PointTransformer",
    "PointTransformerSegmentation",
    "SolidsPartNet",
    "SolidsPointNet",
    "load_model",
]
