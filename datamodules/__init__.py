"""Sources of samples; a new one is a subclass of `PTQData`."""

from pack_ptq.datamodules.base import PTQData
from pack_ptq.datamodules.digits import DigitsData
from pack_ptq.datamodules.image_folder import ImageFolderData
from pack_ptq.datamodules.tensors import TensorData

__all__ = ["DigitsData", "ImageFolderData", "PTQData", "TensorData"]
