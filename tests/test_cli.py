"""The command line from end to end: the default run, its folder, the other commands, and every refusal."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from e2e_helpers import TinyNet, _one_thread, assert_same, cli, make_images, packs_of, refusal

from pack_ptq.cli import main

__all__ = ["_one_thread"]

DIGITS = ("quantize", "--config", "digits_w3a3", "--recipe.reconstruction.steps", "10", "--recipe.tuning.steps", "2")
STEPS = ("--recipe.reconstruction.steps=2", "--recipe.tuning.steps=2")
KEYS = {"model", "data", "protocol", "seed", "versions", "packs", "scores", "peak_memory_bytes"}
INNER = {
    "metrics": {"full_precision", "rounded_to_nearest", "quantized", "num_samples"},
    "bits": {"weight_average", "activation_average", "per_pack"},
    "size_bytes": {"full_precision", "quantized"},
    "seconds": {"scoring", "reconstruction", "total"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of a whole run in a process of its own."""
    run_dir = tmp_path_factory.mktemp("cli") / "run"
    return run_dir, cli(*DIGITS, "--run_dir", run_dir).stdout


def test_the_run_ends_with_the_table(finished):
    run_dir, output = finished
    rows = ("full precision", "rounded to nearest", "quantized")
    places = [output.index(f"\n{row}  ") for row in rows]
    assert places == sorted(places)
    assert output.rstrip().endswith(f"tensorboard --logdir {run_dir}")


def test_report_has_the_fixed_keys(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    assert set(report) >= KEYS | set(INNER)
    for key, inner in INNER.items():
        assert set(report[key]) >= inner
    assert report["metrics"]["num_samples"] == 500
    assert report["metrics"]["full_precision"]["top1"] == pytest.approx(99.2, abs=0.01)
    assert set(report["seconds"]["reconstruction"]) == {"per_pack", "total"}
    assert report["size_bytes"]["quantized"] < report["size_bytes"]["full_precision"] / 8
    assert [b for pack in report["packs"] for b in pack] == list(report["scores"])
    assert set(report["versions"]) >= {"torch", "lightning", "pack-ptq"}


def test_folder_holds_what_is_promised(finished):
    names = {path.name for path in finished[0].iterdir()}
    assert names >= {"config.yaml", "plan.json", "packs", "report.json", "tensorboard"}
    assert list((finished[0] / "tensorboard").glob("events.*"))
    assert not [path for path in finished[0].rglob("*") if path.name.startswith((".partial-", ".cache-"))]
    for path in finished[0].rglob("*.pt"):
        torch.load(path, weights_only=True)


def test_config_in_the_folder_is_complete_and_runs_again(finished, tmp_path):
    run_dir, config = finished[0], yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert set(config) == {"model", "data", "recipe", "scoring", "packing", "bits", "evaluation", "hardware", "seed"}
    assert config["recipe"]["reconstruction"]["steps"] == 10
    assert config["data"]["init_args"]["num_calibration"] == 512
    main(["quantize", "--config", str(run_dir / "config.yaml"), "--run_dir", str(tmp_path / "other")])
    assert_same(packs_of(tmp_path / "other"), packs_of(run_dir))
    first, second = (json.loads((f / "report.json").read_text()) for f in (run_dir, tmp_path / "other"))
    assert first["metrics"] == second["metrics"]
    assert (tmp_path / "other" / "config.yaml").read_text() == (run_dir / "config.yaml").read_text()


def test_evaluate_measures_what_the_run_measured(finished, capsys):
    main(["evaluate", "--run_dir", str(finished[0])])
    quantized = json.loads((finished[0] / "report.json").read_text())["metrics"]["quantized"]
    assert capsys.readouterr().out.split() == ["top1", f"{quantized['top1']:.2f}", "top5", f"{quantized['top5']:.2f}"]


def test_report_shows_the_table_again(finished, capsys):
    run_dir, output = finished
    main(["report", "--run_dir", str(run_dir)])
    table = capsys.readouterr().out
    assert "rounded to nearest" in table
    assert output.endswith(table)


def test_same_command_on_a_finished_folder_shows_the_report(finished, capsys):
    run_dir, output = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    main([*DIGITS, "--run_dir", str(run_dir)])
    assert output.endswith(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_configs_lists_the_shipped_ones(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert all(len(line.split()) > 1 for line in lines)
    titles = [index for index, line in enumerate(lines) if not line.startswith(" ")]
    assert titles == [0, names.index("recipes,")]
    assert titles[0] < names.index("digits_w3a3") < titles[1] < names.index("recipes/qdrop")


def test_another_config_on_the_folder_is_refused_by_its_keys(finished, capsys):
    other = ("--run_dir", finished[0], "--seed", 1, "--recipe.weight.bits", 4)
    message = refusal(capsys, *DIGITS, *other)
    assert "recipe.weight.bits (3 there, 4 now)" in message
    assert "seed (0 there, 1 now)" in message
    assert "allowed" in message


def test_other_data_on_the_folder_is_refused(finished, capsys):
    message = refusal(capsys, *DIGITS, "--run_dir", finished[0], "--data.init_args.calibration_seed", 1)
    assert "data.init_args.calibration_seed (0 there, 1 now)" in message
    assert "data (other samples)" in message


def test_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert "files of something else" in refusal(capsys, *DIGITS, "--run_dir", tmp_path)
    assert "allowed: a folder" in refusal(capsys, *DIGITS, "--run_dir", tmp_path / "thesis.tex")


WRONG = {
    "unknown key": (["--foo", "1"], ["foo is no key; allowed: model, data, recipe"]),
    "unknown nested key": (["--recipe.weight.bitz", "3"], ["recipe.weight.bitz is no key; allowed: bits, observer"]),
    "unknown model key": (["--model.foo", "3"], ["model.foo is no key", "model.checkpoint"]),
    "unknown data key": (["--data.init_args.foo", "3"], ["data.init_args.foo is no key; allowed: num_calibration"]),
    "type of a data key": (
        ["--data.class_path", "pack_ptq.datamodules.SolidsData", "--data.init_args.num_points", "many"],
        ["data.init_args.num_points is 'many'; allowed: int"],
    ),
    "unfinished data class": (
        ["--data.class_path", "pack_ptq.datamodules.PointCloudData"],
        [
            "data.class_path is 'pack_ptq.datamodules.",
            "; allowed: a class that has calibration_clouds, labels, test_clouds, too",
        ],
    ),
    "bits too low": (["--recipe.weight.bits", "1"], ["recipe.weight.bits is 1; allowed: 2 to 8"]),
    "bits too high": (["--recipe.activation.bits", "9"], ["recipe.activation.bits is 9; allowed: 2 to 8"]),
    "type": (["--recipe.weight.bits", "three"], ["recipe.weight.bits is 'three'; allowed: int"]),
    "type of steps": (["--recipe.reconstruction.steps", "1.5"], ["reconstruction.steps is '1.5'; allowed: int, null"]),
    "protocol": (["--recipe.protocol", "none"], ["recipe.protocol is 'none'; allowed: first_last_8, all"]),
    "seed": (["--seed", "-1"], ["seed is -1; allowed: 0 or more"]),
    "devices": (["--hardware.devices", "0"], ["hardware.devices is 0; allowed: 1 or more"]),
    "more processes than samples": (
        ["--hardware.devices", "3", "--data.init_args.num_calibration", "2", "--data.init_args.batch_size", "1"],
        ["hardware.devices is 3; allowed: 1 to 2"],
    ),
    "accelerator": (["--hardware.accelerator", "tpu"], ["hardware.accelerator is 'tpu'; allowed: auto, cpu, gpu"]),
    "precision of products": (
        ["--hardware.matmul_precision", "bf16"],
        ["hardware.matmul_precision is 'bf16'; allowed: highest, high, medium"],
    ),
    "packing class": (
        ["--packing.class_path", "pack_ptq.callbacks.HessianScoring"],
        ["packing", "subclass of Packing"],
    ),
    "packing class path": (["--packing.class_path", "nowhere.Foo"], ["packing.class_path is 'nowhere.Foo'"]),
    "packing size": (
        ["--packing.class_path", "pack_ptq.callbacks.FixedPacking", "--packing.init_args.size", "0"],
        ["packing.init_args.size is 0; allowed: 1 or more"],
    ),
    "blocks": (["--model.blocks", "zzz*"], ["model.blocks is 'zzz*'", "allowed"]),
    "cache": (["--recipe.reconstruction.cache_bytes", "9999"], ["cache_bytes is 9999; allowed: 131072 or more"]),
    "fewer samples than a batch": (
        ["--data.init_args.num_calibration", "10"],
        ["data.init_args.batch_size is 64; allowed: 1 to 10", "data.init_args.num_calibration"],
    ),
    "missing checkpoint": (["--model.checkpoint", "no.pt"], ["model.checkpoint is 'no.pt'; allowed: an existing file"]),
    "class": (["--model.class_path", "pack_ptq.models.Nope"], ["model.class_path is 'pack_ptq.models.Nope'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_before_work_starts(case, tmp_path, capsys):
    given, expected = WRONG[case]
    message = refusal(capsys, *DIGITS, "--run_dir", tmp_path / "run", *given)
    for words in expected:
        assert words in message
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    message = refusal(capsys, *DIGITS, "--run_dir", tmp_path / "run", "--hardware.accelerator", "gpu")
    assert "hardware.accelerator is 'gpu" in message
    assert "allowed: auto, cpu" in message
    assert not (tmp_path / "run").exists()


def test_a_refusal_in_a_process_of_its_own_is_one_message():
    done = cli("quantize", "--config", "digits_w3a3", "--recipe.weight.bits", "9", code=2)
    assert done.stderr == "pack-ptq: recipe.weight.bits is 9; allowed: 2 to 8\n"


@pytest.mark.parametrize("arguments", [[], ["foo"], ["quantize"], ["evaluate"], ["quantize", "--config"]])
def test_incomplete_commands_are_refused(arguments, capsys):
    refusal(capsys, *arguments)


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_folders_without_a_run_are_refused(command, tmp_path, capsys):
    assert "run_dir is" in refusal(capsys, command, "--run_dir", tmp_path)


def test_unknown_config_names_are_refused(capsys):
    message = refusal(capsys, "quantize", "--config", "imagenet/nope")
    assert "config is 'imagenet/nope'; allowed: a YAML file, or a name that `pack-ptq configs` lists" in message


RECIPES = {
    "unknown name": (None, "config is 'recipes/nope'; allowed: a YAML file, or a name that `pack-ptq configs` lists"),
    "key": ("recipe:\n  reconstruction:\n    drop: 1\n", "recipe.reconstruction.drop is no key; allowed: steps"),
    "section": ("recipe:\n  reconstruction: 3\n", "recipe.reconstruction is '3'; allowed: keys of ReconstructionSpec"),
    "class": ("scoring:\n  class_path: pack_ptq.callbacks.No\n", "scoring.class_path is 'pack_ptq.callbacks.No'"),
    "init argument": (
        "packing:\n  class_path: pack_ptq.callbacks.NoPacking\n  init_args:\n    max_blocks: 3\n",
        "packing.init_args.max_blocks is no key; allowed: none",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_wrong_second_configs_are_refused(case, tmp_path, capsys):
    content, words = RECIPES[case]
    (tmp_path / "c.yaml").write_text(content or "")
    second = tmp_path / "c.yaml" if content else "recipes/nope"
    message = refusal(capsys, "quantize", "--config", "imagenet/resnet18_w3a3", "--config", second)
    assert words in message


DATA = "model:\n  class_path: pack_ptq.models.DigitsResNet\ndata:\n  class_path: pack_ptq.datamodules.DigitsData\n"
YAMLS = {
    "top-level key": (DATA + "foo: 1\n", "foo is no key; allowed: model, data"),
    "nested key": (DATA + "recipe:\n  weight:\n    bitz: 1\n", "recipe.weight.bitz is no key; allowed: bits"),
    "data key": (DATA + "  init_args:\n    foo: 1\n", "data.init_args.foo is no key; allowed: num_calibration"),
    "bits": (DATA + "recipe:\n  weight:\n    bits: 10\n", "recipe.weight.bits is 10; allowed: 2 to 8"),
    "type": (DATA + "recipe:\n  weight:\n    bits: low\n", "recipe.weight.bits is 'low'; allowed: int"),
    "no mapping": ("- 1\n", "config"),
    "no YAML": ("model: [\n", "config"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_wrong_files_are_refused(case, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(YAMLS[case][0])
    message = refusal(capsys, "quantize", "--config", tmp_path / "c.yaml", "--run_dir", tmp_path / "run")
    assert YAMLS[case][1] in message
    assert not (tmp_path / "run").exists()


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path, capsys):
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4 nothing")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    torch.save(TinyNet().state_dict(), tmp_path / "foreign.pt")
    for name in ("damaged.pt", "damaged.safetensors", "foreign.pt"):
        message = refusal(capsys, *DIGITS, "--run_dir", tmp_path / "run", "--model.checkpoint", tmp_path / name)
        assert f"model.checkpoint is '{tmp_path / name}'" in message
        assert ("does not fit" if name == "foreign.pt" else "undamaged") in message
    assert not (tmp_path / "run").exists()


NETWORKS = {
    "GivesTuple": "output is tuple; allowed: one tensor",
    "GivesFeatureMap": "output is (2, 6, 8, 8); allowed for classification: one tensor (batch, classes)",
    "GivesTwoScores": "gives 2 scores per sample; allowed: 10",
    "NaNWeight": "block1.b.weight",
    "NaNActivation": "the input of layer block2.a holds NaN or infinity",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_cannot_serve_are_refused(name, tmp_path, capsys):
    model = ("--model.class_path", f"e2e_helpers.{name}", "--model.init_args.channels", 1)
    assert NETWORKS[name] in refusal(capsys, *DIGITS, "--run_dir", tmp_path / "run", *model)
    assert not (tmp_path / "run").exists()


def test_nan_in_a_later_sample_names_the_layer(tmp_path, capsys):
    model = ("--model.class_path", "e2e_helpers.LateNaN", "--model.init_args.channels", 1)
    data = ("--data.class_path", "e2e_helpers.OddDigits", "--data.init_args.hot", 33)
    message = refusal(capsys, *DIGITS, "--run_dir", tmp_path / "run", *model, *data)
    assert "the input of layer block2.a holds NaN or infinity" in message


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Arguments of a run on generated images."""
    make_images(tmp_path / "calibration", 6)
    make_images(tmp_path / "test", 3)
    (tmp_path / "classes").write_text("\n".join(f"class{i:03d}" for i in range(10)))
    size = {"image_size": 8, "mean": "[0.5,0.5,0.5]", "std": "[0.5,0.5,0.5]", "num_calibration": 8, "batch_size": 4}
    paths = {f"{n}_dir": tmp_path / n for n in ("calibration", "test")} | {"classes": tmp_path / "classes"}
    arguments = [f"--data.init_args.{key}={value}" for key, value in {**paths, **size}.items()]
    model = ["--model.class_path", "e2e_helpers.TinyNet", "--data.class_path", "pack_ptq.datamodules.ImageFolderData"]
    return ["quantize", *model, *arguments, *STEPS, f"--run_dir={tmp_path / 'run'}"]


def test_image_folders_serve_and_their_config_is_complete(images, tmp_path):
    main([*images, "--data.init_args.crop_ratio=0.5"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]
    assert config["image_size"] == 8
    assert config["mean"] == [0.5] * 3
    assert config["crop_ratio"] == 0.5
    main(["quantize", "--config", str(tmp_path / "run" / "config.yaml"), "--run_dir", str(tmp_path / "again")])
    assert_same(packs_of(tmp_path / "again"), packs_of(tmp_path / "run"))


def test_missing_empty_and_small_folders_are_refused(images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        message = refusal(capsys, *images, f"--data.init_args.calibration_dir={tmp_path / folder}")
        assert f"data.init_args.calibration_dir is '{tmp_path / folder}'; allowed" in message
    message = refusal(capsys, *images, "--data.init_args.batch_size=9")
    assert "data.init_args.batch_size is 9; allowed: 1 to 8" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["calibration", "test"])
def test_a_corrupt_image_is_named_or_skipped(folder, images, tmp_path, capsys):
    broken = tmp_path / folder / "class001" / "1.png"
    broken.write_bytes(broken.read_bytes()[:150])
    everything = [*images, "--data.init_args.num_calibration=null"]
    message = refusal(capsys, *everything)
    assert f"data.init_args.{folder}_dir has 1 corrupt images" in message
    assert broken.name in message
    assert "on_corrupt skip" in message
    main([*everything, "--data.init_args.on_corrupt=skip"])
    metrics = json.loads((tmp_path / "run" / "report.json").read_text())["metrics"]
    assert metrics["num_samples"] == 6 - (folder == "test")


@pytest.mark.parametrize("writes", [0, 1, 4, 7])
def test_a_full_disk_leaves_nothing_half_written(writes, tmp_path, capsys, monkeypatch):
    real, done = os.fsync, []

    def fsync(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    message = refusal(capsys, *DIGITS, "--run_dir", tmp_path / "run")
    assert "No space left on device; allowed: a writable folder with room" in message
    assert not list(tmp_path.rglob(".partial-*"))
    monkeypatch.undo()
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())
    for path in tmp_path.rglob("*.pt"):
        torch.load(path, weights_only=True)
