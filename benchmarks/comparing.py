"""What the benchmarks that compare recipes share: their options, and one `pack-ptq compare` a configuration."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from asset_keys import asset_keys


def options(text: str, out: str) -> argparse.ArgumentParser:
    """Give a parser of the options they all have.

    Args:
        text: What the benchmark is.
        out: Folder if none is given.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def compare(chosen: argparse.Namespace, recipes: Sequence[str], keys: Sequence[str]) -> None:
    """Run the recipes on each configuration, in the folder OUT/CONFIG.

    Args:
        chosen: What `options` has read.
        recipes: Names or files.
        keys: Of every run.
    """
    for config in chosen.configs:
        command = [sys.executable, "-m", "pack_ptq", "compare", "--recipes", *recipes, "--seeds", *chosen.seeds]
        command += [f"--out={chosen.out / config.replace('/', '-')}", "--config", config, *asset_keys(config), *keys]
        status = subprocess.run(command, check=False).returncode
        if status:
            sys.exit(status)  # it has said why
