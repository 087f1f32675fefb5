"""AIQViT's ablation: each of its parts alone, in pairs and all together, and what its low-rank compensation may be.

python benchmarks/ablation_aiqvit.py --configs imagenet/vit_tiny_w3a3 --seeds 0 1 2 --out runs/ablation_aiqvit [any key]

Each row has some of the parts of `recipes/aiqvit`, and of `--base` (the same recipe unless given) all else: low-rank
compensation, focusing codes after softmax (uniform without), curriculum. `--others` adds rows with ranks that are fixed
instead of searched, and with the search behind rounded weights; `--recipes` adds shipped ones. `--low_rank_steps` goes
to the search, and to the fit of what it chose.
"""

from pathlib import Path
from typing import Any

import yaml
from comparing import compare, options

from pack_ptq.configs.shipped import recipe_file

PARTS = ("low_rank", "focusing", "curriculum")
VARIANTS: dict[str, dict[str, Any]] = {
    "rank_20": {"ranks": [20]},
    "rank_100": {"ranks": [100]},
    "joint": {"order": "joint"},
}


def shipped(recipe: str) -> dict[str, Any]:
    """Give what a shipped recipe's file holds."""
    return yaml.safe_load(Path(recipe_file(recipe)).read_text())


def with_parts(base: str, parts: tuple[str, ...], low_rank: dict[str, Any]) -> dict[str, Any]:
    """Give the base recipe with some of the parts, its compensation with settings of its own."""
    content, ours = shipped(base), shipped("aiqvit")["recipe"]["reconstruction"]
    fit = content["recipe"]["reconstruction"]
    fit["low_rank"] = ours["low_rank"] | low_rank if "low_rank" in parts else {"search_steps": 0}
    content["recipe"]["post_softmax"] = "focusing" if "focusing" in parts else "uniform"
    fit["curriculum"] = ours["curriculum"] if "curriculum" in parts else None
    return content


def write_recipes(base: str, out: Path, steps: int, others: bool) -> list[str]:
    """Write a recipe for each row and give the files."""
    subsets = [tuple(part for bit, part in enumerate(PARTS) if number >> bit & 1) for number in range(2 ** len(PARTS))]
    subsets.sort(key=len)
    rows = {"+".join(parts) or "nothing": (parts, {}) for parts in subsets}
    if others:
        rows |= {name: (PARTS, settings) for name, settings in VARIANTS.items()}
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (parts, settings) in rows.items():
        path = out / f"{name}.yaml"
        low_rank = {"search_steps": steps, "fit_steps": steps, **settings}
        path.write_text(yaml.safe_dump(with_parts(base, parts, low_rank)))
        files.append(str(path))
    return files


def main() -> None:
    parser = options(__doc__, out="runs/ablation_aiqvit")
    parser.add_argument("--base", default="aiqvit")
    parser.add_argument("--low_rank_steps", type=int, default=250)
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--recipes", nargs="*", default=[])
    chosen, keys = parser.parse_known_args()
    files = write_recipes(chosen.base, chosen.out / "recipes", chosen.low_rank_steps, chosen.others)
    compare(chosen, [*files, *chosen.recipes], keys)


if __name__ == "__main__":
    main()
