"""The README's dataset of one's own, word for word: its file, its samples, and the command that it gives."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e_helpers import _one_thread

from pack_ptq.cli import main
from pack_ptq.models import PointNet2

__all__ = ["_one_thread"]

README = (Path(__file__).parents[1] / "README.md").read_text()
SHORT = {
    "recipe.reconstruction.steps": 2,
    "recipe.reconstruction.batch_size": 4,
    "recipe.tuning.steps": 2,
    "recipe.tuning.batch_size": 4,
    "recipe.weight.observer": "minmax",  # the search for ranges would take most of the time
    "recipe.activation.observer": "minmax",
    "data.init_args.num_points": 32,
    "data.init_args.batch_size": 8,
    "data.init_args.num_calibration": 8,
    "run_dir": "run",
}


def file_and_command() -> tuple[str, list[str]]:
    """Give the Python of the README's new dataset, and the words of the command behind it."""
    found = re.search(r"This is all of `my_clouds\.py`.*?```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", README, re.DOTALL)
    assert found
    return found[1], shlex.split(found[2].replace("\\\n", ""))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Give a current folder with the README's file, scans of three kinds, and weights."""
    (tmp_path / "my_clouds.py").write_text(file_and_command()[0])
    random = np.random.RandomState(0)
    for split, count in (("train", 4), ("test", 3)):
        folder = tmp_path / "scans" / split
        folder.mkdir(parents=True)
        for kind, extent in (("bolt", [1, 1, 9]), ("nut", [5, 5, 1]), ("washer", [9, 9, 1])):
            for number in range(count):
                rows = random.standard_normal((40, 3)) * extent
                np.savetxt(folder / f"{kind}-{number:03}.csv", rows, delimiter=",")
    torch.manual_seed(0)
    torch.save(PointNet2(num_classes=3).state_dict(), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "my_clouds", raising=False)
    return tmp_path


def test_it_takes_thirty_lines():
    assert len(file_and_command()[0].splitlines()) <= 30


def test_the_readmes_dataset_runs_by_the_readmes_command(place, capsys):
    program, *words = file_and_command()[1]
    assert program == "pack-ptq"
    main([*words, *[f"--{key}={value}" for key, value in SHORT.items()]])
    report = json.loads((place / "run" / "report.json").read_text())
    for measured in ("full_precision", "rounded_to_nearest", "quantized"):
        assert set(report["metrics"][measured]) == {"overall", "mean_class", "f1"}
        assert all(0 <= value <= 100 for value in report["metrics"][measured].values())
    assert report["metrics"]["num_samples"] == 9
    assert report["data"]["class_path"] == "my_clouds.MyClouds"
    assert {unit["steps"] for unit in report["reconstruction"]} == {2}
    # Its sampling and grouping are named, in the report and at the end of the run.
    stages = ("abstraction1", "abstraction2")
    calls = [(call, stage) for stage in stages for call in ("farthest_point_sampling", "ball_query")]
    assert [(each["call"], each["module"]) for each in report["selections"]] == calls
    assert all(each["full_precision"] for each in report["selections"])
    line = (
        "\npicked by coordinates in full precision: farthest_point_sampling in abstraction1, abstraction2 | ball_query"
    )
    assert line in capsys.readouterr().out
    main(["report", "--run_dir=run"])
    assert line in "\n" + capsys.readouterr().out
    main(["evaluate", "--run_dir=run"])
    words = capsys.readouterr().out.split()
    assert {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)} == pytest.approx(
        report["metrics"]["quantized"], abs=0.005
    )


def test_a_file_that_cannot_be_read_is_named_before_work_starts(place, capsys):
    (place / "scans" / "test" / "nut-001.csv").write_text("1,2,three\n")
    with pytest.raises(SystemExit):
        main([*file_and_command()[1][1:], *[f"--{key}={value}" for key, value in SHORT.items()]])
    message = capsys.readouterr().err
    assert "1 test clouds of 9 that cannot serve: scans/test/nut-001.csv cannot be read: could not convert" in message
    assert not (place / "run").exists()
