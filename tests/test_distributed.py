"""Two processes on the CPU (gloo) give the scores, packs and counts of one, resume, and refuse without hanging."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import OddDigits, _one_thread, assert_same, cli, environment, packs_of

from pack_ptq.cli import main

__all__ = ["_one_thread"]
pytestmark = [pytest.mark.ddp, pytest.mark.timeout(300)]

# 101 calibration and 499 test samples: neither is divisible by 2.
RUN = ["quantize", "--config=digits_w3a3", "--data.class_path=e2e_helpers.OddDigits", "--hardware.accelerator=cpu"]
RUN += ["--recipe.reconstruction.steps=8", "--data.init_args.num_calibration=101"]
RUN += ["--recipe.tuning.views=2", "--recipe.tuning.steps=6"]
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


# Runs the command line, and lets every process note what it holds when the network is tuned, and what it cached.
NOTER = """
import os, sys
import torch
from pack_ptq import pipeline, tune
from pack_ptq.states import tuned_state
real, outputs, held = pipeline.tune, tune._outputs, {}
def noted_outputs(*args):
    data = outputs(*args)
    held.update(inputs=data.full_input.tensor.clone(), outputs=data.target.tensor.clone())
    return data
def noted(chain, *args, **more):
    result = real(chain, *args, **more)
    content = tuned_state(chain, result) | held
    torch.save(content, os.path.join(os.environ["NOTES"], os.environ.get("LOCAL_RANK", "0") + ".pt"))
    return result
tune._outputs, pipeline.tune = noted_outputs, noted
from pack_ptq.cli import main
main()
"""


# Runs the command line, where the second process comes to tell its message when the first has told it and is gone.
LATE = """
import os, time
from pack_ptq import cli
tell = cli._tell
def late(message):
    time.sleep(2 * int(os.environ.get("LOCAL_RANK", "0")))
    tell(message)
cli._tell = late
cli.main()
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    main([*RUN, f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """Run in two processes, whose notes lie beside the run folder."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    script = run_dir.parent / "noter.py"
    script.write_text(NOTER)
    command, notes = [sys.executable, str(script), *TWO, f"--run_dir={run_dir}"], str(run_dir.parent)
    done = subprocess.run(command, env=environment(NOTES=notes), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


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


def test_every_process_tunes_to_the_same(two):
    first, second = (torch.load(two[0].parent / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    written = torch.load(two[0] / "tuned.pt", weights_only=True)
    for part in ("layers", "biases"):
        assert_same(first[part], second[part])
        assert_same(first[part], written[part])
    for result in (first["result"], second["result"]):
        assert {k: v for k, v in result.items() if k != "seconds"} == {
            k: v for k, v in written["result"].items() if k != "seconds"
        }
    assert written["result"]["accepted"]


def test_processes_share_out_the_samples_and_change_them_on_their_own(two):
    images = [torch.load(two[0].parent / f"{rank}.pt", weights_only=True)["inputs"] for rank in (0, 1)]
    assert [len(x) for x in images] == [2 * 51, 2 * 50]
    samples = OddDigits().calibration_dataset()[:][0]
    assert torch.equal(images[0][:51], samples[0::2])
    assert torch.equal(images[1][:50], samples[1::2])
    noise = [images[0][51:101] - images[0][:50], images[1][50:] - images[1][:50]]
    assert all(0.04 < each.std() < 0.06 for each in noise)
    assert not torch.allclose(*noise, atol=1e-3)


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
    first, second = (torch.load(folder / "tuned.pt", weights_only=True) for folder in (tmp_path / "run", two[0]))
    del first["result"]["seconds"], second["result"]["seconds"]
    assert_same(first, second)


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


def test_nan_that_only_the_second_process_sees_is_refused_by_both_and_told_by_one(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    hot = ["--data.init_args.hot=33", "--model.class_path=e2e_helpers.LateNaN", "--model.init_args.channels=1"]
    command = [sys.executable, str(script), *TWO, *hot, f"--run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    told = "pack-ptq: the input of layer block2.a holds NaN or infinity; allowed: finite activations\n"
    assert (done.returncode, done.stderr) == (2, told)
    assert not orphans(tmp_path / "run")
