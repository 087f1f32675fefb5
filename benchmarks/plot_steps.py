"""Draw accuracy against optimisation steps from the comparisons of `pack-ptq compare`; needs matplotlib.

python benchmarks/plot_steps.py runs/*/comparison.json --out docs/accuracy_against_steps.svg
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    full = []
    for path in arguments.comparisons:
        for row in json.loads(path.read_text())["rows"]:
            full.append(row["full_precision"]["top1"])
            for run in row["runs"]:
                points[row["recipe"]][run["total_steps"]].append(run["metrics"]["top1"])
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.axhline(full[0], color="gray", linestyle=":", label="full precision")
    for recipe, by_steps in points.items():
        steps = sorted(by_steps)
        means = [sum(by_steps[n]) / len(by_steps[n]) for n in steps]
        axes.plot(steps, means, marker="o", label=recipe)
        axes.fill_between(steps, [min(by_steps[n]) for n in steps], [max(by_steps[n]) for n in steps], alpha=0.2)
    axes.set(xscale="log", xlabel="optimisation steps, all units and the last pass", ylabel="top-1 (%), hard weights")
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
