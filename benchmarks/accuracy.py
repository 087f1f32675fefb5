"""Compare recipes on shipped configurations, with the project's own weights and images; the README's tables.

python benchmarks/accuracy.py --configs cifar10/resnet20_w3a3 --recipes none qdrop --out runs/accuracy [any key]

Each configuration gets the folder OUT/CONFIG of one `pack-ptq compare`: run folders, comparison.md and comparison.json.
Weights and images are looked for in PACK_PTQ_ASSETS; keys after the options go to every run.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / "../shared/assets"
ASSETS = Path(os.environ.get("PACK_PTQ_ASSETS", DEFAULT)).resolve()
NETWORKS = {
    "resnet20": ("resnet20_cifar10", "cifar10", "train", "test"),
    "resnet32": ("resnet32_cifar10", "cifar10", "train", "test"),
    "vit_tiny": ("vit_tiny_patch16_224.fp16", "imagenet", "calibration", "val"),
    "efficientnet_lite0": ("tf_efficientnet_lite0.fp16", "imagenet", "calibration", "val"),
}


def asset_keys(config: str) -> list[str]:
    """Give the keys that point a configuration to its weights and images."""
    weights, images, calibration, test = NETWORKS[Path(config).name.rsplit("_w", 1)[0]]
    folder = ASSETS / images
    keys = {
        "model.checkpoint": ASSETS / "models" / f"{weights}.safetensors",
        "data.init_args.calibration_dir": folder / calibration,
        "data.init_args.test_dir": folder / test,
    }
    if images == "imagenet":
        # The assets hold 1000 calibration images, and test images without a margin to crop.
        keys |= {"data.init_args.classes": folder / "classes.txt", "data.init_args.num_calibration": "null"}
        keys |= {"data.init_args.crop_ratio": 1.0, "model.pretrained": "false"}
    return [f"--{key}={value}" for key, value in keys.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--recipes", nargs="+", default=["none"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    arguments, further = parser.parse_known_args()
    for config in arguments.configs:
        out = arguments.out / config.replace("/", "-")
        command = [sys.executable, "-m", "pack_ptq", "compare", "--recipes", *arguments.recipes]
        command += ["--seeds", *arguments.seeds, f"--out={out}", "--config", config, *asset_keys(config), *further]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
