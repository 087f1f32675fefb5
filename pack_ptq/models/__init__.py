"""Where networks come from."""

from pack_ptq.models.cifar_resnet import CifarResNet
from pack_ptq.models.digits_resnet import DigitsResNet
from pack_ptq.models.loaded import LoadedModel
from pack_ptq.models.source import ModelSource, load_model

__all__ = ["CifarResNet", "DigitsResNet", "LoadedModel", "ModelSource", "load_model"]
