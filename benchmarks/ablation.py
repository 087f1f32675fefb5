"""The paper's ablation: how blocks are packed, times how packs get their bits, on one or more networks.

python benchmarks/ablation.py --configs digits_w3a3 --seeds 0 1 2 --out runs/ablation [any key of quantize]

Each combination is a recipe file in OUT; `pack-ptq compare` runs them, so finished runs are read and not repeated. All
take the same number of steps per unit, and none is tuned afterwards unless a key says so.
"""

from pathlib import Path

import yaml
from comparing import compare, options

CALLBACKS = "pack_ptq.callbacks."
PACKINGS = {
    "none": {"class_path": CALLBACKS + "NoPacking"},
    "random": {"class_path": CALLBACKS + "RandomPacking"},
    "pairs": {"class_path": CALLBACKS + "FixedPacking", "init_args": {"size": 2}},
    "triples": {"class_path": CALLBACKS + "FixedPacking", "init_args": {"size": 3}},
    "whole": {"class_path": CALLBACKS + "WholePacking"},
    "hessian": {"class_path": CALLBACKS + "HessianPacking"},
}
BITS = {
    "uniform": {"class_path": CALLBACKS + "UniformBits"},
    "mixed": {"class_path": CALLBACKS + "MixedBits", "init_args": {"granularity": "pack"}},
}


def write_recipes(out: Path) -> list[str]:
    """Write a recipe for each combination and give the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for packing, how_packed in PACKINGS.items():
        for bits, how_mixed in BITS.items():
            path = out / f"{packing}_{bits}.yaml"
            path.write_text(yaml.safe_dump({"packing": how_packed, "bits": how_mixed}))
            files.append(str(path))
    return files


def main() -> None:
    chosen, keys = options(__doc__, out="runs/ablation").parse_known_args()
    compare(chosen, write_recipes(chosen.out / "recipes"), ["--recipe.tuning.steps=0", *keys])


if __name__ == "__main__":
    main()
