"""A run that is killed at any moment ends, when the same call is made again, as one that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import TinyNet, _one_thread, assert_same, environment, packs_of

import pack_ptq
from pack_ptq import QuantizerSpec, Recipe, ReconstructionSpec, UserError
from pack_ptq.callbacks import NoPacking
from pack_ptq.cli import main
from pack_ptq.datamodules import TensorData

__all__ = ["_one_thread"]

STEPS = 6
COMMAND = ["quantize", "--config", "digits_w3a3", f"--recipe.reconstruction.steps={STEPS}"]
COMMAND += ["--data.init_args.num_calibration=100", "--packing.class_path=pack_ptq.callbacks.NoPacking"]
UNITS = 4
TIMES = {"seconds", "peak_memory_bytes", "reconstruction"}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the project catches it."""


def run(run_dir: Path) -> dict[str, Any]:
    """Make a run that takes a moment: five layers in four units."""
    return tiny(run_dir, QuantizerSpec(3), packing=NoPacking())


def tiny(run_dir: Path, weight: QuantizerSpec | None = None, seed: int = 0, samples: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    network = TinyNet().eval()
    inputs = torch.randn(21, 3, 8, 8, generator=torch.Generator().manual_seed(samples))
    data = TensorData(inputs, (inputs, torch.arange(21) % 10), batch_size=8)
    recipe = Recipe(weight or QuantizerSpec(), reconstruction=ReconstructionSpec(steps=STEPS, batch_size=8))
    return pack_ptq.quantize(network, data, recipe, run_dir=run_dir, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a run that nothing has stopped."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(run_dir)
    torch.set_num_threads(before)
    return run_dir


def assert_same_run(a: Path, b: Path) -> None:
    assert_same(packs_of(a), packs_of(b))
    for name in ("network.pt", "calibration.pt"):
        assert_same(*(torch.load(folder / name, weights_only=True) for folder in (a, b)))
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (a, b))
    assert {k: v for k, v in first.items() if k not in TIMES} == {k: v for k, v in second.items() if k not in TIMES}
    for name in ("config.yaml", "identity.json", "measured.json"):
        assert (a / name).read_text() == (b / name).read_text()
    assert not list(b.rglob(".partial-*"))


def kill_at_replace(monkeypatch, count: int, after: bool) -> None:
    """Let the process end at its `count`-th finished file, before or after the file gets its name."""
    real, seen = os.replace, []

    def replace(source: Any, target: Any) -> None:
        seen.append(target)
        if len(seen) == count and not after:
            raise Killed
        real(source, target)
        if len(seen) == count:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after the rename"])
def test_killed_at_every_write_in_turn(after, whole, tmp_path, monkeypatch):
    """One folder is killed again and again, at each file that it writes, until the run has ended."""
    deaths = 0
    for _ in range(60):
        with monkeypatch.context() as patch:
            kill_at_replace(patch, 1 if after else 1 + deaths % 2, after)
            try:
                run(tmp_path / "run")
                break
            except Killed:
                deaths += 1
    assert deaths >= UNITS + 6
    run(tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_half_written_files_are_cleared(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_replace(patch, 9, after=False)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    assert list((tmp_path / "run").rglob(".partial-*"))
    (tmp_path / "run" / "packs" / ".partial-17-001.pt").write_bytes(b"half")
    (tmp_path / "run" / ".cache-x1").write_bytes(b"half")
    run(tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".cache-*"))
    assert_same_run(whole, tmp_path / "run")


def test_finished_units_are_not_fitted_again(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # identity, config, full precision, plan, network, calibration, nearest, then the units
        kill_at_replace(patch, 7 + 2, after=True)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "packs").iterdir()}
    assert sorted(before) == ["000.pt", "001.pt"]
    run(tmp_path / "run")
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "packs").iterdir()}
    assert len(now) == UNITS
    assert {name: now[name] for name in before} == before


def test_kill_9_while_a_pack_is_fitted(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "pack_ptq", *COMMAND, "--run_dir", str(run_dir)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (run_dir / "packs" / "001.pt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert not (run_dir / "report.json").exists()
    assert 2 <= len(list((run_dir / "packs").glob("0*.pt"))) < 8
    main([*COMMAND, "--run_dir", str(run_dir)])
    main([*COMMAND, "--run_dir", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", run_dir)


def test_every_tensor_file_loads_with_weights_only(whole):
    files = list(whole.rglob("*.pt"))
    assert len(files) == UNITS + 2
    for path in files:
        torch.load(path, weights_only=True)


def test_other_weights_data_or_settings_are_refused_by_name(tmp_path):
    tiny(tmp_path / "run")
    tiny(tmp_path / "run")
    with pytest.raises(UserError, match=r"model \(other weights\); allowed"):
        tiny(tmp_path / "run", seed=1)
    with pytest.raises(UserError, match=r"data \(other samples\); allowed"):
        tiny(tmp_path / "run", samples=1)
    with pytest.raises(UserError, match=r"packing\.class_path .*NoPacking.* now"):
        tiny(tmp_path / "run", packing=NoPacking())
