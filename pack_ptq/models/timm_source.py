"""Networks of timm."""

from functools import partial
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import nn

from pack_ptq.errors import refuse
from pack_ptq.models.construction import build_from_library, closest
from pack_ptq.models.loaded import LoadedModel
from pack_ptq.types import Preprocessing


def build_timm(name: str, pretrained: bool, init_args: dict[str, Any]) -> LoadedModel:
    """Build a timm network by its name in timm, with or without a tag of its weights.

    Raises:
        UserError: The name, its tag or an argument is unknown, or the weights cannot be had.
    """
    key = f"timm/{name}"
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise refuse("model.name", key, closest(architecture, timm.list_models()))
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise refuse("model.name", key, ", ".join([architecture, *tagged]))
    network = build_from_library(key, partial(_create, name), pretrained, init_args)
    return LoadedModel(network, _preprocessing(network, init_args))


def _create(name: str, pretrained: bool, init_args: dict[str, Any]) -> nn.Module:
    return timm.create_model(name, pretrained=pretrained, **init_args)


def _preprocessing(network: nn.Module, init_args: dict[str, Any]) -> Preprocessing | None:
    config = resolve_model_data_config(network)
    if init_args.get("in_chans", 3) != len(config["mean"]):
        return None  # timm's mean and std are those of colour images
    # timm's config knows the size of the published weights, not the one the network was built for.
    size = init_args.get("img_size", config["input_size"][1:])
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(
        image_size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_ratio=config["crop_pct"],
        interpolation=config["interpolation"],
    )
