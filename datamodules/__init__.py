"""Sources of samples; a new one is a subclass of `PTQData`, or of `PointCloudData` for point clouds."""

from pack_ptq.datamodules.base import PTQData
from pack_ptq.datamodules.cloud import Cloud, CloudArrays, CloudFiles
from pack_ptq.datamodules.cloud_formats import read_cloud
from pack_ptq.datamodules.digits import DigitsData
from pack_ptq.datamodules.image_folder import ImageFolderData
from pack_ptq.datamodules.modelnet import ModelNet10Data, ModelNet40Data
from pack_ptq.datamodules.point_clouds import PointCloudData
from pack_ptq.datamodules.point_folder import PointFolderData
from pack_ptq.datamodules.point_labels import ClassLabels, PartLabels
from pack_ptq.datamodules.rooted_points import RootedPointData
from pack_ptq.datamodules.scanobjectnn import ScanObjectNNData
from pack_ptq.datamodules.shapenet_part import ShapeNetPartData
from pack_ptq.datamodules.solids import SolidsData
from pack_ptq.datamodules.tensors import TensorData

__all__ = [
    "ClassLabels",
    "Cloud",
    "CloudArrays",
    "CloudFiles",
    "DigitsData",
    "ImageFolderData",
    "ModelNet10Data",
    "ModelNet40Data",
    "PTQData",
    "PartLabels",
    "PointCloudData",
    "PointFolderData",
    "RootedPointData",
    "ScanObjectNNData",
    "ShapeNetPartData",
    "SolidsData",
    "TensorData",
    "read_cloud",
]
