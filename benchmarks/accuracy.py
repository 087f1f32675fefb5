"""Run configurations over seeds and write their accuracy as Markdown and JSON; the README's table comes from here.

python benchmarks/accuracy.py --configs cifar10/resnet20_w3a3 --seeds 0 1 2 --out runs/accuracy [any key of quantize]

A seed also draws the calibration images. Finished runs are read, not repeated. Weights and images are looked for in
PACK_PTQ_ASSETS; keys after the options go to every run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / "../shared/assets"
ASSETS = Path(os.environ.get("PACK_PTQ_ASSETS", DEFAULT)).resolve()
WEIGHTS = {
    "resnet20": ("resnet20_cifar10", "cifar10", "train", "test"),
    "resnet32": ("resnet32_cifar10", "cifar10", "train", "test"),
    "efficientnet_lite0": ("tf_efficientnet_lite0.fp16", "imagenet", "calibration", "val"),
}


def measure(config: str, seed: int, folder: Path, further: list[str]) -> dict:
    network = Path(config).name.rsplit("_w", 1)[0]
    weights, images, calibration, test = WEIGHTS[network]
    data = ["--data.init_args.calibration_dir", ASSETS / images / calibration]
    data += ["--data.init_args.test_dir", ASSETS / images / test, "--data.init_args.calibration_seed", seed]
    if images == "imagenet":
        # The assets hold 1000 calibration images, and test images without a margin to crop.
        data += [
            "--data.init_args.classes",
            ASSETS / images / "classes.txt",
            "--data.init_args.num_calibration",
            "null",
        ]
        data += ["--data.init_args.crop_ratio", "1.0", "--model.pretrained", "false"]
    run_dir = folder / f"{config.replace('/', '-')}-seed{seed}"
    command = [sys.executable, "-m", "pack_ptq", "quantize", "--config", config, "--seed", seed, "--run_dir", run_dir]
    command += ["--model.checkpoint", ASSETS / "models" / f"{weights}.safetensors", *data, *further]
    subprocess.run([str(word) for word in command], check=True)
    return json.loads((run_dir / "report.json").read_text())


def row(config: str, reports: list[dict]) -> dict:
    def values(key: str) -> list[float]:
        return [report["metrics"][key]["top1"] for report in reports]

    first = reports[0]
    return {
        "config": config,
        "protocol": first["protocol"],
        "seeds": [report["seed"] for report in reports],
        "weight_bits": first["bits"]["weight_average"],
        "activation_bits": first["bits"]["activation_average"],
        "full_precision": statistics.mean(values("full_precision")),
        "rounded_to_nearest": values("rounded_to_nearest"),
        "quantized": values("quantized"),
        "steps_per_unit": first["reconstruction"][0]["steps"],
        "seconds": [report["seconds"]["total"] for report in reports],
        "device": first["device"],
    }


def markdown(rows: list[dict]) -> str:
    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    heads = ["configuration", "bits spent W / A", "steps", "full precision", "rounded to nearest", "pack-ptq"]
    heads += ["seeds", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        lines.append(
            f"| {r['config']} ({r['protocol']}) | {r['weight_bits']:.2f} / {r['activation_bits']:.2f} | "
            f"{r['steps_per_unit']} | {r['full_precision']:.2f} | {spread(r['rounded_to_nearest'])} | "
            f"**{spread(r['quantized'])}** | {len(r['seeds'])} | {statistics.mean(r['seconds']) / 60:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    arguments, further = parser.parse_known_args()
    rows = []
    for config in arguments.configs:
        reports = [measure(config, seed, arguments.out, further) for seed in arguments.seeds]
        rows.append(row(config, reports))
        (arguments.out / "accuracy.json").write_text(json.dumps(rows, indent=2) + "\n")
        (arguments.out / "accuracy.md").write_text(markdown(rows) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
