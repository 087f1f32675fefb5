"""Run several recipes on one network over several seeds; every finished run goes into the comparison at once."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pack_ptq import api
from pack_ptq.comparison import compare_reports, markdown
from pack_ptq.configs.shipped import recipe_file
from pack_ptq.errors import UserError, refuse
from pack_ptq.overridden import in_words, overridden
from pack_ptq.runs import RunFolder, atomic_write
from pack_ptq.trainers import is_first_process
from pack_ptq.types import SEEDS, SEEDS_IN_WORDS

BASE = "none"
MEASUREMENTS = "measurements"
CALIBRATION_SEED = "data.init_args.calibration_seed"
Parse = Callable[[list[str]], dict[str, Any]]


@dataclass(frozen=True)
class ComparedRun:
    """One recipe with one seed.

    Attributes:
        recipe: Its name in the table.
        seed: Of the run.
        settings: Arguments of `api.quantize`.
        overridden: Keys for every run that the recipe goes before, as `overridden.overridden` gives them.
    """

    recipe: str
    seed: int
    settings: dict[str, Any]
    overridden: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """How messages call the run."""
        return f"recipe {self.recipe}, seed {self.seed}"


def plan_runs(
    keys: list[str], recipes: Sequence[str], seeds: Sequence[int], out: str, parse: Parse
) -> list[ComparedRun]:
    """Read all combinations, seed by seed, before any of them runs.

    A recipe comes after `keys`, so what it states goes before them. The seed is also the datamodule's
    `calibration_seed` where it has one, unless `keys` set it.

    Args:
        keys: Arguments of `pack-ptq quantize` for every run.
        recipes: Names below `configs/recipes`, YAML files, or `none` for the configuration alone.
        seeds: Each 0 or more.
        out: Folder that gets a run folder for each combination.
        parse: Turns arguments of `pack-ptq quantize` into typed values.

    Raises:
        UserError: Something the user gave cannot serve.
    """
    _check(keys, recipes, seeds, out)
    files = {_label(name): None if name == BASE else recipe_file(name) for name in recipes}
    drawn = hasattr(parse(keys)["data"], "calibration_seed") and not _given(
        keys, r"data\.(init_args\.)?calibration_seed"
    )
    known = {
        label: overridden(keys, yaml.safe_load(Path(file).read_text())) if file else {} for label, file in files.items()
    }
    runs = []
    for seed in seeds:
        for label, file in files.items():
            recipe = ["--config", file] if file else []
            own = [f"--seed={seed}", f"--run_dir={Path(out) / f'{label}-seed{seed}'}"]
            own += [f"--{CALIBRATION_SEED}={seed}"] if drawn else []
            try:
                runs.append(ComparedRun(label, seed, parse([*keys, *recipe, *own]), known[label]))
            except UserError as error:
                raise UserError(f"recipe {label}: {error}") from error
    return runs


def run_all(runs: Sequence[ComparedRun], out: str) -> str:
    """Make the runs, or read those that are finished, and keep `comparison.json` and `comparison.md` up to date.

    Returns:
        The Markdown.

    Raises:
        UserError: A run is refused; the message names its recipe and seed.
    """
    reports: dict[str, list[dict[str, Any]]] = {run.recipe: [] for run in runs}
    changed = {run.recipe: run.overridden for run in runs if run.overridden}
    if is_first_process():
        for recipe, found in changed.items():
            print(f"recipe {recipe} has its own {in_words(found)}", flush=True)
    text = ""
    for number, run in enumerate(runs, start=1):
        if is_first_process():
            print(f"{run.title} ({number} of {len(runs)})", flush=True)
        try:
            reports[run.recipe].append(api.quantize(**run.settings, show=True, measurements=Path(out) / MEASUREMENTS))
        except UserError as error:
            raise UserError(f"{run.title}: {error}") from error
        comparison = compare_reports(reports, len(runs), changed)
        text = markdown(comparison)
        if is_first_process():
            RunFolder.write_json(Path(out) / "comparison.json", comparison)
            atomic_write(Path(out) / "comparison.md", text.encode())
    return text


def _label(name: str) -> str:
    """Give a recipe's name in the table and in folders: of a file, its stem."""
    return Path(name).stem if Path(name).is_file() else name


def _given(keys: Sequence[str], pattern: str) -> bool:
    return any(re.fullmatch(rf"--{pattern}(=.*)?", key) for key in keys)


def _check(keys: Sequence[str], recipes: Sequence[str], seeds: Sequence[int], out: str) -> None:
    """Refuse empty lists, what is asked for twice, and keys that the comparison itself sets."""
    for key, values in (("recipes", [_label(name) for name in recipes]), ("seeds", list(seeds))):
        if not values:
            raise refuse(key, values, "one or more")
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise refuse(
                key, twice[0], "each name, or stem of a file's name, once" if key == "recipes" else "each once"
            )
    if foreign := [seed for seed in seeds if seed not in SEEDS]:
        raise refuse("seeds", foreign[0], SEEDS_IN_WORDS)
    for key, instead in (("seed", "seeds"), ("run_dir", "out")):
        if _given(keys, key):
            raise UserError(f"{key} is no key of compare; allowed: {instead}, and the other keys of quantize")
    if not out or (Path(out).exists() and not Path(out).is_dir()):
        raise refuse("out", out, "a folder")
