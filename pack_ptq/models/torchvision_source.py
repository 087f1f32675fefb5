"""Networks of torchvision."""

import inspect
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
from torchvision.transforms._presets import ImageClassification

from pack_ptq.errors import refuse
from pack_ptq.models.construction import build_from_library, closest
from pack_ptq.models.loaded import LoadedModel
from pack_ptq.types import Preprocessing


def build_torchvision(name: str, pretrained: bool, init_args: dict[str, Any]) -> LoadedModel:
    """Build a torchvision network by its name in torchvision.

    Raises:
        UserError: The name or an argument is unknown, or the weights cannot be had.
    """
    key = f"torchvision/{name}"
    if name not in list_models():
        raise refuse("model.name", key, closest(name, list_models()))
    network = build_from_library(key, partial(_create, name), pretrained, init_args)
    return LoadedModel(network, _preprocessing(name))


def _create(name: str, pretrained: bool, init_args: dict[str, Any]) -> nn.Module:
    # Detectors and segmenters would download a backbone even where no weights are asked for.
    if not pretrained and "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        init_args = {"weights_backbone": None, **init_args}
    return get_model(name, weights="DEFAULT" if pretrained else None, **init_args)


def _preprocessing(name: str) -> Preprocessing | None:
    transform = get_model_weights(name).DEFAULT.transforms()
    if not isinstance(transform, ImageClassification):
        return None
    (crop,), (resize,) = transform.crop_size, transform.resize_size
    return Preprocessing(
        image_size=(crop, crop),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        crop_ratio=crop / resize,
        interpolation=transform.interpolation.value,
    )
