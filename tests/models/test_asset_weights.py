import os
from pathlib import Path

import pytest
import torch
from torchvision.io import decode_image

from pack_ptq.errors import UserError
from pack_ptq.models import ModelSource

DEFAULT = Path(__file__).parents[2] / ".." / "shared" / "assets"
ASSETS = Path(os.environ.get("PACK_PTQ_ASSETS", DEFAULT)).resolve()

pytestmark = pytest.mark.skipif(not (ASSETS / "models").is_dir(), reason="needs the assets (PACK_PTQ_ASSETS)")


def cifar_network(depth: int):
    return ModelSource(
        class_path="pack_ptq.models.CifarResNet",
        init_args={"depth": depth},
        checkpoint=str(ASSETS / "models" / f"resnet{depth}_cifar10.safetensors"),
    ).load()


def top1(depth: int, step: int) -> float:
    """Percent over every step-th of the 10,000 test images, by class and name."""
    loaded = cifar_network(depth)
    folders = sorted((ASSETS / "cifar10" / "test").iterdir())
    files = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())][::step]
    images = torch.stack([decode_image(str(file)) for file, _ in files]) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (loaded.preprocessing.mean, loaded.preprocessing.std))
    predicted = torch.cat([loaded.network(batch).argmax(1) for batch in ((images - mean) / std).split(500)])
    return 100 * (predicted == torch.tensor([label for _, label in files])).double().mean().item()


def test_resnet20_on_every_tenth_image():
    assert top1(20, step=10) == pytest.approx(81, abs=2)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "expected"), [(20, 81.03), (32, 82.56)])
def test_cifar_networks_reach_their_accuracy(depth, expected):
    assert top1(depth, step=1) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_half_precision_weights_of_timm_networks(name):
    loaded = ModelSource(name=f"timm/{name}", checkpoint=str(ASSETS / "models" / f"{name}.fp16.safetensors")).load()
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert loaded.preprocessing.mean == loaded.preprocessing.std == (0.5, 0.5, 0.5)
    assert loaded.network(torch.zeros(1, 3, 224, 224)).isfinite().all()


def test_weights_of_another_depth_are_refused():
    file = str(ASSETS / "models" / "resnet32_cifar10.safetensors")
    source = ModelSource(class_path="pack_ptq.models.CifarResNet", init_args={"depth": 20}, checkpoint=file)
    with pytest.raises(UserError, match=r"resnet32_cifar10.safetensors.*does not fit it: 60 unexpected"):
        source.load()
