import math

import pytest
import torch
from torch import nn

from pack_ptq.errors import UserError
from pack_ptq.models import CifarResNet, LoadedModel, ModelSource, load_model


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, ["model.name is None", "timm/NAME", "model.class_path"]),
        ({"name": "timm/resnet18", "class_path": "a.B"}, ["model.name is 'timm/resnet18'", "model.class_path 'a.B'"]),
        ({"name": "resnet18"}, ["model.name is 'resnet18'", "timm/NAME or torchvision/NAME"]),
        ({"name": "keras/resnet18"}, ["model.name is 'keras/resnet18'", "timm/NAME or torchvision/NAME"]),
        ({"name": "timm/"}, ["model.name is 'timm/'", "timm/NAME or torchvision/NAME"]),
        (
            {"name": "timm/resnet18", "pretrained": True, "checkpoint": "a.pth"},
            ["model.pretrained is True", "false", "model.checkpoint 'a.pth'"],
        ),
        ({"class_path": "a.B", "pretrained": True}, ["model.pretrained is True", "false", "model.class_path"]),
    ],
)
def test_contradictions_are_refused(fields, parts):
    with pytest.raises(UserError) as refusal:
        ModelSource(**fields)
    assert all(part in str(refusal.value) for part in parts)


def test_source_goes_through_json():
    source = ModelSource(class_path="a.B", init_args={"depth": 20}, checkpoint="a.pth", blocks=["layer1.0"])
    assert ModelSource.from_json(source.to_json()) == source


def test_loaded_network_is_ready():
    loaded = ModelSource(class_path="pack_ptq.models.CifarResNet", init_args={"depth": 8}).load()
    assert isinstance(loaded, LoadedModel)
    assert not any(module.training for module in loaded.network.modules())
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}


def half_precision_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).half()


def test_half_precision_network_becomes_float32():
    network = load_model(ModelSource(class_path=f"{__name__}.half_precision_network")).network
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["layer1.0.conv2.weight", "bn1.running_var"])
def test_non_finite_weights_are_refused_by_layer(tmp_path, key, value):
    state = CifarResNet(depth=8).state_dict()
    state[key].view(-1)[3] = value
    torch.save(state, tmp_path / "a.pth")
    source = ModelSource(
        class_path="pack_ptq.models.CifarResNet", init_args={"depth": 8}, checkpoint=str(tmp_path / "a.pth")
    )
    with pytest.raises(UserError, match=f"NaN or infinite .* layer .*{key}"):
        source.load()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2,), -math.inf), persistent=False)


def test_infinite_masks_outside_the_weights_are_allowed():
    assert isinstance(ModelSource(class_path=f"{__name__}.Masked").load().network, Masked)
