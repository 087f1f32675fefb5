"""`pack-ptq compare` from end to end: its folder, resuming, the order of settings, and every refusal."""

import json
from pathlib import Path

import pytest
import yaml
from e2e_helpers import _one_thread, assert_same, packs_of, refusal

from pack_ptq import api
from pack_ptq.cli import main
from pack_ptq.errors import UserError

__all__ = ["_one_thread"]

STEPS = ("--recipe.reconstruction.steps=2", "--recipe.tuning.steps=0")
KEYS = ("--config", "digits_w3a3", *STEPS, "--data.init_args.num_calibration=64")


def compare(out: Path, *arguments: str) -> dict:
    main(["compare", *KEYS, f"--out={out}", *arguments])
    return json.loads((out / "comparison.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of a comparison of a shipped recipe, one of the user's and the configuration alone."""
    root = tmp_path_factory.mktemp("compare")
    (root / "mine.yaml").write_text("recipe:\n  reconstruction:\n    steps: 3\n")
    compare(root / "out", "--recipes", "qdrop", str(root / "mine.yaml"), "none", "--seeds", "1", "0")
    return root / "out"


def config_of(run_dir: Path) -> dict:
    return yaml.safe_load((run_dir / "config.yaml").read_text())


def test_every_combination_is_a_run_folder_with_its_seed(finished) -> None:
    folders = {path.name for path in finished.iterdir() if path.is_dir()}
    runs = {f"{recipe}-seed{seed}" for recipe in ("qdrop", "mine", "none") for seed in (0, 1)}
    assert folders == runs | {"measurements"}
    for name in runs:
        config = config_of(finished / name)
        assert config["seed"] == config["data"]["init_args"]["calibration_seed"] == int(name[-1])
    packing = {name: config_of(finished / f"{name}-seed0")["packing"]["class_path"] for name in ("qdrop", "none")}
    assert packing["qdrop"].endswith("NoPacking")
    assert packing["none"].endswith("NoPacking")


def test_what_a_recipe_states_goes_before_the_keys(finished) -> None:
    steps = {
        r["recipe"]: r["steps_per_unit"]["mean"] for r in json.loads((finished / "comparison.json").read_text())["rows"]
    }
    assert steps == {"qdrop": 2, "mine": 3, "none": 2}


def test_what_a_recipe_states_instead_of_keys_is_told_first(tmp_path, capsys, monkeypatch) -> None:
    def stops(**settings: object) -> dict:
        raise UserError("stop")

    monkeypatch.setattr(api, "quantize", stops)
    keys = ("--recipe.reconstruction.batch_size=16", "--recipe.reconstruction.rounding_lr", "0.007")
    with pytest.raises(SystemExit):
        compare(tmp_path / "out", "--recipes", "rtn", "none", "qdrop", *keys)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("recipe rtn has its own recipe.reconstruction.steps 0 instead of 2")
    assert second == "recipe qdrop has its own recipe.reconstruction.batch_size 32 instead of 16"


def test_rows_are_those_of_the_reports(finished) -> None:
    comparison = json.loads((finished / "comparison.json").read_text())
    assert [r["recipe"] for r in comparison["rows"]] == ["qdrop", "mine", "none"]
    assert comparison["runs_finished"] == comparison["runs_planned"] == 6
    for r in comparison["rows"]:
        assert r["seeds"] == [1, 0]
        for run in r["runs"]:
            report = json.loads((finished / f"{r['recipe']}-seed{run['seed']}" / "report.json").read_text())
            assert run["metrics"] == report["metrics"]["quantized"]
            assert run["total_steps"] == sum(unit["steps"] for unit in report["reconstruction"])


def test_a_run_among_others_is_the_run_alone(finished, tmp_path) -> None:
    own = ["--seed=0", "--data.init_args.calibration_seed=0", f"--run_dir={tmp_path / 'alone'}"]
    main(["quantize", *KEYS, *own])
    assert_same(packs_of(finished / "none-seed0"), packs_of(tmp_path / "alone"))


def test_what_runs_have_in_common_is_measured_once(tmp_path, capsys, monkeypatch) -> None:
    keys = ("--recipes", "qdrop", "rtn", "--seeds", "0", "--recipe.reconstruction.steps=1")
    found = compare(tmp_path / "together", *keys)
    measured = capsys.readouterr().out.count("measuring: ")
    assert measured == 4  # full precision, rounded to nearest, and each recipe's end
    real = api.quantize
    monkeypatch.setattr(api, "quantize", lambda *a, measurements, **settings: real(*a, **settings))
    assert compare(tmp_path / "apart", *keys)["rows"][0]["runs"][0]["metrics"] == found["rows"][0]["runs"][0]["metrics"]
    assert capsys.readouterr().out.count("measuring: ") == 6
    for run in ("qdrop-seed0", "rtn-seed0"):
        together, apart = (tmp_path / name / run / "measured.json" for name in ("together", "apart"))
        assert json.loads(together.read_text()) == json.loads(apart.read_text())


def test_finished_runs_are_only_read_and_the_table_ends_the_output(finished, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.parent != finished}
    compare(finished, "--recipes", "qdrop", "none", "--seeds", "0")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.parent != finished} == before
    output = capsys.readouterr().out
    assert f"{(finished / 'comparison.md').read_text()}\ncomparison   {finished}/comparison.md" in output


def test_an_interrupted_comparison_keeps_what_is_finished_and_resumes(tmp_path, monkeypatch) -> None:
    real, calls = api.quantize, []

    def stops(*arguments: object, **settings: object) -> dict:
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(api, "quantize", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, "--recipes", "qdrop", "none", "--seeds", "0")
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert ([r["recipe"] for r in found["rows"]], found["runs_finished"], found["runs_planned"]) == (["qdrop"], 1, 2)
    assert "Not finished: 1 of 2" in (tmp_path / "comparison.md").read_text()
    monkeypatch.undo()
    assert compare(tmp_path, "--recipes", "qdrop", "none", "--seeds", "0")["runs_finished"] == 2


def test_a_calibration_seed_given_as_a_key_is_kept(tmp_path) -> None:
    compare(tmp_path, "--recipes", "none", "--seeds", "1", "--data.init_args.calibration_seed=5")
    assert config_of(tmp_path / "none-seed1")["data"]["init_args"]["calibration_seed"] == 5


def test_a_failing_run_is_named(tmp_path, capsys, monkeypatch) -> None:
    def fails(**settings: object) -> dict:
        raise UserError("the disk is full")

    monkeypatch.setattr(api, "quantize", fails)
    message = refusal(capsys, "compare", *KEYS, "--out", tmp_path / "out", "--recipes", "qdrop", "--seeds", 3)
    assert message == "pack-ptq: recipe qdrop, seed 3: the disk is full\n"


REFUSED = {
    "unknown recipe": (["--recipes", "rtn", "nope"], "recipes is 'nope'; allowed: none, adaround, "),
    "recipe twice": (["--recipes", "rtn", "qdrop", "rtn"], "recipes is 'rtn'; allowed: each name"),
    "no recipe": (["--recipes"], "--recipes: expected at least one argument"),
    "recipes not given": ([], "recipes"),
    "no seed": (["--recipes", "rtn", "--seeds"], "--seeds: expected at least one argument"),
    "seed twice": (["--recipes", "rtn", "--seeds", "2", "2"], "seeds is 2; allowed: each once"),
    "seed below 0": (["--recipes", "rtn", "--seeds", "-1"], "seeds is -1; allowed: 0 or more"),
    "seed beyond NumPy": (["--recipes", "rtn", "--seeds", "4294967296"], "allowed: 0 or more, up to 4294967295"),
    "no folder": (["--recipes", "rtn", "--out="], "out is ''; allowed: a folder"),
    "type of seed": (["--recipes", "rtn", "--seeds", "x"], "seeds is 'x'; allowed: int"),
    "seed": (["--recipes", "rtn", "--seed", "1"], "seed is no key of compare; allowed: seeds"),
    "run_dir": (["--recipes", "rtn", "--run_dir=x"], "run_dir is no key of compare; allowed: out"),
    "unknown key": (["--recipes", "rtn", "--foo", "1"], "foo is no key; allowed: model, data, recipe"),
    "wrong value": (["--recipes", "rtn", "--recipe.weight.bits=1"], "recipe.weight.bits is 1; allowed: 2 to 8"),
    "word before the options": (["stray", "--recipes", "rtn"], "stray is no key; allowed: recipes, seeds, out"),
    "variant": (["--recipes", "none", "--scoring.init_args.variant=x"], "variant is 'x'; allowed: paper, release"),
    "variant with task": (
        ["--recipes", "pack_ptq_release", "none", "--scoring.init_args={loss: task, variant: release}"],
        "scoring.init_args.loss is 'task'; allowed: kl with",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_serve_is_refused_before_any_run(case, tmp_path, capsys) -> None:
    arguments, words = REFUSED[case]
    first = arguments[:1] if arguments[:1] == ["stray"] else []
    rest = arguments[len(first) :]
    assert words in refusal(capsys, "compare", *first, *KEYS, f"--out={tmp_path / 'out'}", *rest)
    assert not (tmp_path / "out").exists()


FILES = {
    "protocol": ("recipe:\n  protocol: all\n", "which sets recipe.protocol; allowed: only recipe.reconstruction"),
    "bits": ("recipe:\n  weight:\n    bits: 2\n", "which sets recipe.weight; allowed: only"),
    "model": ("model:\n  name: timm/resnet18\n", "which sets model; allowed: only"),
    "nothing": ("", "allowed: a YAML file with keys of recipe.reconstruction"),
    "no YAML": ("recipe: [\n", "allowed: a YAML file (while parsing"),
    "class": ("packing:\n  class_path: pack_ptq.callbacks.No\n", "recipe mine: packing.class_path is 'pack_ptq.callb"),
    "argument": (
        "packing:\n  class_path: pack_ptq.callbacks.NoPacking\n  init_args:\n    size: 1\n",
        "recipe mine: packing.init_args.size is no key; allowed: none",
    ),
    "section": ("recipe:\n  reconstruction: 3\n", "recipe mine: recipe.reconstruction is '3'; allowed: keys of Reco"),
}


@pytest.mark.parametrize("case", FILES)
def test_recipes_of_ones_own_that_cannot_serve_are_refused(case, tmp_path, capsys) -> None:
    content, words = FILES[case]
    (tmp_path / "mine.yaml").write_text(content)
    recipes = ("--recipes", "qdrop", tmp_path / "mine.yaml")
    assert words in refusal(capsys, "compare", *KEYS, f"--out={tmp_path / 'out'}", *recipes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["recipes", "config"])
def test_a_file_that_is_no_text_is_refused(key, tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\x00")
    others = () if key == "recipes" else ("--recipes", "none")
    message = refusal(capsys, "compare", *KEYS, f"--out={tmp_path / 'out'}", *others, f"--{key}", path)
    assert f"{key} is '{path}'; allowed: a readable YAML file (not text in UTF-8)" in message


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "out").write_text("")
    message = refusal(capsys, "compare", *KEYS, "--recipes", "none", "--out", tmp_path / "out")
    assert f"out is '{tmp_path / 'out'}'; allowed: a folder" in message
