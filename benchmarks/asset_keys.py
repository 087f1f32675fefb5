"""The keys that point a shipped configuration to the project's own weights and samples, in `PACK_PTQ_ASSETS`."""

import os
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / "../shared/assets"
ASSETS = Path(os.environ.get("PACK_PTQ_ASSETS", DEFAULT)).resolve()
WEIGHTS = {
    "cifar10/resnet20": "resnet20_cifar10",
    "cifar10/resnet32": "resnet32_cifar10",
    "imagenet/vit_tiny": "vit_tiny_patch16_224.fp16",
    "imagenet/efficientnet_lite0": "tf_efficientnet_lite0.fp16",
    "modelnet40/pointnet": "pointnet_modelnet40",
    "modelnet40/densepoint": "densepoint_modelnet40",
}
CIFAR10, IMAGENET, CLOUDS = ASSETS / "cifar10", ASSETS / "imagenet", ASSETS / "pointclouds"
SAMPLES = {
    "cifar10": {
        "data.init_args.calibration_dir": CIFAR10 / "train",
        "data.init_args.test_dir": CIFAR10 / "test",
    },
    # The assets hold 1000 calibration images, and test images without a margin to crop.
    "imagenet": {
        "data.init_args.calibration_dir": IMAGENET / "calibration",
        "data.init_args.test_dir": IMAGENET / "val",
        "data.init_args.classes": IMAGENET / "classes.txt",
        "data.init_args.num_calibration": "null",
        "data.init_args.crop_ratio": 1.0,
        "model.pretrained": "false",
    },
    # Not ModelNet itself, but other objects of its classes; all 96 without labels calibrate.
    "modelnet40": {
        "data.class_path": "pack_ptq.datamodules.PointFolderData",
        "data.init_args.calibration": CLOUDS / "shapes_calibration.npz",
        "data.init_args.test": CLOUDS / "shapes_test.npz",
        "data.init_args.classes": CLOUDS / "classes.txt",
        "data.init_args.num_calibration": "null",
    },
}


def asset_keys(config: str) -> list[str]:
    """Give the keys for a configuration by its name; none for one that brings its weights and samples."""
    family = config.rpartition("/")[0]
    if not family:
        return []
    weights = ASSETS / "models" / f"{WEIGHTS[config.rsplit('_w', 1)[0]]}.safetensors"
    return [f"--{key}={value}" for key, value in {"model.checkpoint": weights, **SAMPLES[family]}.items()]
