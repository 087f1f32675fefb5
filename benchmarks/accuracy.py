"""Compare recipes on shipped configurations, with the project's own weights and samples; the README's tables.

python benchmarks/accuracy.py --configs cifar10/resnet20_w3a3 --recipes none qdrop --out runs/accuracy [any key]

Each configuration gets the folder OUT/CONFIG of one `pack-ptq compare`: run folders, comparison.md and comparison.json.
Weights and samples are looked for in PACK_PTQ_ASSETS; `digits_*` and `solids_*` have their own. Keys after the options
go to every run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from asset_keys import asset_keys


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
