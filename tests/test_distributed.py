"""Two processes on the CPU (gloo) give the scores, packs and counts of one, resume, and refuse without hanging."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import _one_thread, assert_same, cli, environment, packs_of

from pack_ptq.cli import main

__all__ = ["_one_thread"]
pytestmark = [pytest.mark.ddp, pytest.mark.timeout(300)]

# 101 calibration and 499 test samples: neither is divisible by 2.
RUN = ["quantize", "--config=digits_w3a3", "--data.class_path=e2e_helpers.OddDigits", "--hardware.accelerator=cpu"]
RUN += ["--recipe.reconstruction.steps=8", "--data.init_args.num_calibration=101"]
TWO = [*RUN, "--hardware.devices=2"]

# Runs the command line, and kills the first process when it has written a file whose name ends in $KILL_AT.
KILLER = """
import os, signal, sys
real = os.replace
def replace(source, target):
    real(source, target)
    if str(target).endswith(os.environ["KILL_AT"]) and os.environ.get("LOCAL_RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
from pack_ptq.cli import main
main()
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    main([*RUN, f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    return run_dir, cli(*TWO, f"--run_dir={run_dir}").stdout


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def test_scores_packs_bits_and_ranges_agree_with_one_process(one, two):
    first, second = content(one / "plan.json"), content(two[0] / "plan.json")
    for key in ("scores", "loss_increase", "squared_error"):
        assert second["scores"][key] == pytest.approx(first["scores"][key], rel=1e-6)
    assert first["scores"]["num_samples"] == second["scores"]["num_samples"] == 101
    assert first["units"] == second["units"]
    assert first["bits"] == second["bits"]


def test_counts_are_exact(one, two):
    first, second = (content(folder / "report.json") for folder in (one, two[0]))
    assert second["processes"] == 2
    assert first["metrics"]["num_samples"] == second["metrics"]["num_samples"] == 499
    for what in ("full_precision", "rounded_to_nearest"):
        for name, value in first["metrics"][what].items():
            right = [value * 499 / 100, second["metrics"][what][name] * 499 / 100]
            assert right == pytest.approx([round(right[0])] * 2, abs=1e-3)
    assert second["metrics"]["quantized"]["top1"] > 90


def test_the_table_is_shown_once(two):
    assert two[1].count("rounded to nearest  ") == 1
    assert two[1].count("measuring: full precision") == 1


@pytest.mark.slow
def test_evaluation_in_two_processes(two):
    run_dir, _ = two
    done = cli("evaluate", "--run_dir", run_dir, "--hardware.devices", 2, "--hardware.accelerator", "cpu")
    assert done.stdout.split()[:2] == [
        "top1",
        f"{content(run_dir / 'report.json')['metrics']['quantized']['top1']:.2f}",
    ]
    assert done.stdout.count("\n") == 1


def test_killed_in_two_processes_it_resumes_bit_for_bit(two, tmp_path):
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    command = [sys.executable, str(script), *TWO, f"--run_dir={tmp_path / 'run'}"]
    killed = subprocess.run(command, env=environment(KILL_AT="001.pt"), capture_output=True, timeout=120)
    assert killed.returncode < 0
    assert sorted(path.name for path in (tmp_path / "run" / "packs").iterdir()) == ["000.pt", "001.pt"]
    assert not orphans(tmp_path / "run")
    cli(*TWO, f"--run_dir={tmp_path / 'run'}")
    assert_same(packs_of(tmp_path / "run"), packs_of(two[0]))
    assert content(tmp_path / "run" / "measured.json") == content(two[0] / "measured.json")


def orphans(run_dir: Path) -> list[str]:
    """Give the processes that still work on a folder after half a minute."""
    until = time.monotonic() + 30
    while True:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(run_dir) in command and int(place.name) != os.getpid():
                found.append(command)
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.2)


def test_nan_that_only_the_second_process_sees_is_refused_by_both(tmp_path):
    hot = ["--data.init_args.hot=33", "--model.class_path=e2e_helpers.LateNaN", "--model.init_args.channels=1"]
    done = cli(*TWO, *hot, f"--run_dir={tmp_path / 'run'}", code=2)
    assert done.stderr == "pack-ptq: the input of layer block2.a holds NaN or infinity; allowed: finite activations\n"
    assert not orphans(tmp_path / "run")
