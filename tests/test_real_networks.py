"""Trained networks on their own images: what a short budget must reach. Needs the assets (PACK_PTQ_ASSETS)."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset

import pack_ptq
from pack_ptq import ModelSource, QuantizerSpec, Recipe, ReconstructionSpec, TuningSpec
from pack_ptq.callbacks import NoPacking
from pack_ptq.datamodules import ImageFolderData

DEFAULT = Path(__file__).parents[1] / ".." / "shared" / "assets"
ASSETS = Path(os.environ.get("PACK_PTQ_ASSETS", DEFAULT)).resolve()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def _assets() -> None:
    assert (ASSETS / "models").is_dir(), f"no assets in {ASSETS}; set PACK_PTQ_ASSETS"


def recipe(bits: int, steps: int, tuning: TuningSpec, **more: Any) -> Recipe:
    return Recipe(
        QuantizerSpec(bits),
        QuantizerSpec(bits, per_channel=False),
        reconstruction=ReconstructionSpec(steps=steps, **more),
        tuning=tuning,
    )


def resnet20(settings: Recipe, run_dir: Path) -> dict[str, Any]:
    """Quantize ResNet-20, and give its metrics on all test images of CIFAR-10."""
    source = ModelSource(
        class_path="pack_ptq.models.CifarResNet",
        init_args={"depth": 20},
        checkpoint=str(ASSETS / "models" / "resnet20_cifar10.safetensors"),
    )
    data = ImageFolderData(ASSETS / "cifar10" / "train", ASSETS / "cifar10" / "test", batch_size=128)
    return pack_ptq.quantize(source, data, settings, packing=NoPacking(), run_dir=run_dir)["metrics"]


def test_resnet20_w3a3_in_300_steps(tmp_path):
    metrics = resnet20(recipe(3, 300, TuningSpec(steps=100)), tmp_path / "run")
    assert metrics["num_samples"] == 10_000
    assert metrics["full_precision"]["top1"] == pytest.approx(81.0, abs=0.2)
    assert metrics["rounded_to_nearest"]["top1"] > 70
    assert metrics["quantized"]["top1"] >= 78.5


def test_resnet20_rounded_to_nearest_is_as_accurate_as_a_plain_reference(tmp_path):
    settings = replace(recipe(3, 0, TuningSpec(steps=0)), bias_correction="none")
    assert resnet20(settings, tmp_path / "run")["rounded_to_nearest"]["top1"] == pytest.approx(66.9, abs=1.5)


class Shortened(ImageFolderData):
    """Every `stride`-th test image of the folder, whose accuracy stands for that of all."""

    stride = 1

    def test_dataset(self) -> Dataset:
        whole: Any = super().test_dataset()
        return Subset(whole, range(0, len(whole), self.stride))


def efficientnet() -> ModelSource:
    return ModelSource(
        name="timm/tf_efficientnet_lite0",
        checkpoint=str(ASSETS / "models" / "tf_efficientnet_lite0.fp16.safetensors"),
    )


def imagenet(**more: Any) -> Shortened:
    root = ASSETS / "imagenet"
    return Shortened(root / "calibration", root / "val", root / "classes.txt", crop_ratio=1.0, batch_size=32, **more)


def test_efficientnet_lite0_keeps_its_accuracy_on_all_images():
    loaded, data = efficientnet().load(), imagenet()
    data.use_preprocessing(loaded.preprocessing)
    right = [(loaded.network(images).argmax(1) == labels).sum() for images, labels in data.test_dataloader()]
    assert len(data.test_dataset()) == 1300
    assert 100 * torch.stack(right).sum().item() / 1300 == pytest.approx(82.3, abs=1)


def test_efficientnet_lite0_w4a4_in_20_steps(tmp_path):
    data = imagenet(num_calibration=64)
    data.stride = 13
    settings = recipe(4, 20, TuningSpec(steps=4, batch_size=8), penalty_weight=0.1, batch_size=8)
    report = pack_ptq.quantize(efficientnet(), data, settings, run_dir=tmp_path / "run")
    metrics = report["metrics"]
    assert metrics["num_samples"] == 100
    assert metrics["full_precision"]["top1"] > 70
    assert metrics["rounded_to_nearest"]["top1"] > 50, "with corrected biases, 10 without"
    assert metrics["quantized"]["top1"] > metrics["rounded_to_nearest"]["top1"]
    assert report["bits"]["weight_average"] == pytest.approx(4, abs=1.5)
    assert report["reconstruction"][0]["name"] == "conv_stem"
