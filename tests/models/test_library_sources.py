from urllib.error import URLError

import pytest
import timm
import torch
from torchvision.models import get_model

from pack_ptq.errors import UserError
from pack_ptq.models import ModelSource
from pack_ptq.types import Preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _no_network(*_, **__):
    raise URLError("Name or service not known")


def test_timm_network_with_preprocessing():
    loaded = ModelSource(name="timm/vit_tiny_patch16_224").load()
    assert loaded.preprocessing == Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, 0.9, "bicubic")
    assert loaded.network(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_timm_name_with_tag_decides_preprocessing():
    assert ModelSource(name="timm/resnet18.tv_in1k").load().preprocessing == Preprocessing(
        (224, 224), **IMAGENET, crop_ratio=0.875, interpolation="bilinear"
    )


@pytest.mark.parametrize(("size", "expected"), [(96, (96, 96)), ([96, 64], (96, 64))])
def test_timm_image_size_of_the_built_network(size, expected):
    source = ModelSource(name="timm/vit_tiny_patch16_224", init_args={"img_size": size, "num_classes": 7})
    loaded = source.load()
    assert loaded.preprocessing.image_size == expected
    assert loaded.network(torch.zeros(1, 3, *expected)).shape == (1, 7)


def test_timm_network_for_grey_images_has_no_preprocessing():
    assert ModelSource(name="timm/resnet18", init_args={"in_chans": 1}).load().preprocessing is None


@pytest.mark.parametrize(
    ("name", "crop_ratio", "interpolation"), [("resnet18", 224 / 256, "bilinear"), ("vit_b_16", 224 / 256, "bilinear")]
)
def test_torchvision_network_with_preprocessing(name, crop_ratio, interpolation):
    loaded = ModelSource(name=f"torchvision/{name}").load()
    assert loaded.preprocessing == Preprocessing(
        (224, 224), **IMAGENET, crop_ratio=crop_ratio, interpolation=interpolation
    )


def test_torchvision_preprocessing_comes_with_a_checkpoint_too(tmp_path):
    torch.manual_seed(0)
    theirs = get_model("mobilenet_v3_small").eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    loaded = ModelSource(name="torchvision/mobilenet_v3_small", checkpoint=str(tmp_path / "a.pth")).load()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.network(images), theirs(images))
    assert loaded.preprocessing is not None


def test_torchvision_segmentation_has_no_preprocessing_and_no_downloaded_backbone(monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _no_network)
    assert ModelSource(name="torchvision/lraspp_mobilenet_v3_large").load().preprocessing is None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm/resnt18", "resnet18"),
        ("timm/resnet18.tv_in2k", "resnet18.tv_in1k"),
        ("torchvision/resnt18", "resnet18"),
        ("torchvision/no such thing", "alexnet"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name, near):
    with pytest.raises(UserError) as refusal:
        ModelSource(name=name).load()
    assert f"model.name is {name!r}" in str(refusal.value)
    assert near in str(refusal.value).split("allowed")[1]


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_wrong_arguments_are_refused_with_the_accepted_ones(name, pretrained):
    with pytest.raises(UserError) as refusal:
        ModelSource(name=name, init_args={"depthh": 1}, pretrained=pretrained).load()
    assert "model.init_args is {'depthh': 1}" in str(refusal.value)
    assert "num_classes" in str(refusal.value)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_failed_downloads_point_to_local_weights(name, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _no_network)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", _no_network)
    with pytest.raises(UserError) as refusal:
        ModelSource(name=name, pretrained=True).load()
    message = str(refusal.value)
    assert "model.pretrained is True" in message
    assert f"weights of {name} could not be downloaded" in message
    assert "model.checkpoint FILE" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_pretrained_weights_are_taken(name, monkeypatch):
    library, _, rest = name.partition("/")
    state = (timm.create_model if library == "timm" else get_model)(rest).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: state)
    network = ModelSource(name=name, pretrained=True).load().network
    assert torch.equal(network.state_dict()["fc.weight"], state["fc.weight"])
