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
from pack_ptq import QuantizerSpec, Recipe, ReconstructionSpec, UserError, api
from pack_ptq.callbacks import HessianPacking, NoPacking
from pack_ptq.cli import main
from pack_ptq.datamodules import TensorData
from pack_ptq.graph.switch import switch
from pack_ptq.modules.tuning import NetworkTuning
from pack_ptq.types import TuningSpec

__all__ = ["_one_thread"]

STEPS = 6
COMMAND = ["quantize", "--config", "digits_w3a3", f"--recipe.reconstruction.steps={STEPS}", "--recipe.tuning.steps=0"]
COMMAND += ["--data.init_args.num_calibration=100", "--packing.class_path=pack_ptq.callbacks.NoPacking"]
UNITS = 4
TIMES = {"seconds", "peak_memory_bytes", "reconstruction", "tuning"}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the project catches it."""


def run(run_dir: Path) -> dict[str, Any]:
    """Make a run that takes a moment: five layers in four units."""
    return tiny(run_dir, QuantizerSpec(2), packing=NoPacking())


def run_tuned(run_dir: Path) -> dict[str, Any]:
    """Make the same run with a last pass, in which scales and biases of every layer move."""
    return tiny(run_dir, QuantizerSpec(2), packing=NoPacking(), tuning=TuningSpec(steps=STEPS, batch_size=8))


def tiny(
    run_dir: Path,
    weight: QuantizerSpec | None = None,
    seed: int = 0,
    samples: int = 0,
    tuning: TuningSpec = TuningSpec(steps=0),  # noqa: B008
    **more: Any,
) -> Any:
    torch.manual_seed(seed)
    network = TinyNet().eval()
    inputs = torch.randn(21, 3, 8, 8, generator=torch.Generator().manual_seed(samples))
    data = TensorData(inputs, (inputs, torch.arange(21) % 10), batch_size=8)
    fit = ReconstructionSpec(steps=STEPS, batch_size=8)
    recipe = Recipe(weight or QuantizerSpec(), reconstruction=fit, tuning=tuning)
    return pack_ptq.quantize(network, data, recipe, run_dir=run_dir, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a run that nothing has stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def whole_tuned(tmp_path_factory) -> Path:
    """Folder of a run with tuning that nothing has stopped."""
    run_dir = tmp_path_factory.mktemp("whole_tuned") / "run"
    run_tuned(run_dir)
    return run_dir


def tuned_of(run_dir: Path) -> Any:
    """Give what the last pass left, without the seconds it took; nothing if there was none."""
    if not (run_dir / "tuned.pt").exists():
        return None
    content = torch.load(run_dir / "tuned.pt", weights_only=True)
    del content["result"]["seconds"]
    return content


def assert_same_run(a: Path, b: Path) -> None:
    assert_same(packs_of(a), packs_of(b))
    assert_same(tuned_of(a), tuned_of(b))
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
        kill_at_replace(patch, 8 + 2, after=True)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "packs").iterdir()}
    assert sorted(before) == ["000.pt", "001.pt"]
    run(tmp_path / "run")
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "packs").iterdir()}
    assert len(now) == UNITS
    assert {name: now[name] for name in before} == before


def kill_at_file(monkeypatch, name: str, after: bool, count: int = 1) -> None:
    """Let the process end at the `count`-th time that a file of this name is finished."""
    real, seen = os.replace, []

    def replace(source: Any, target: Any) -> None:
        seen.extend([target] if Path(target).name == name else [])
        if len(seen) == count and not after:
            raise Killed
        real(source, target)
        if len(seen) == count:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)


def kill_in_step(monkeypatch, step: int) -> None:
    real = NetworkTuning.training_step

    def training_step(self: Any, batch: Any, index: int) -> Any:
        if index == step:
            raise Killed
        return real(self, batch, index)

    monkeypatch.setattr(NetworkTuning, "training_step", training_step)


DEATHS = {
    "in a step": lambda patch: kill_in_step(patch, STEPS // 2),
    "before it is written": lambda patch: kill_at_file(patch, "tuned.pt", after=False),
    "after it is written": lambda patch: kill_at_file(patch, "tuned.pt", after=True),
    "after the last measurement": lambda patch: kill_at_file(patch, "measured.json", after=True, count=3),
    "before the report": lambda patch: kill_at_file(patch, "report.json", after=False),
}


@pytest.mark.parametrize("moment", DEATHS)
def test_killed_while_or_after_the_network_is_tuned(moment, whole_tuned, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        DEATHS[moment](patch)
        with pytest.raises(Killed):
            run_tuned(tmp_path / "run")
    written = (tmp_path / "run" / "tuned.pt").exists()
    assert written == (moment not in ("in a step", "before it is written"))
    if not written:
        with pytest.raises(UserError, match=r"run_dir is .*; allowed: a finished run; .* tuning is still to do"):
            pack_ptq.load(tmp_path / "run", network=TinyNet())
    run_tuned(tmp_path / "run")
    assert_same_run(whole_tuned, tmp_path / "run")


def test_a_tuned_network_is_not_tuned_again(whole_tuned, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_file(patch, "tuned.pt", after=True)
        with pytest.raises(Killed):
            run_tuned(tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_in_step(patch, 0)
        run_tuned(tmp_path / "run")
    assert_same_run(whole_tuned, tmp_path / "run")


def test_full_precision_is_measured_before_biases_change(whole, whole_tuned):
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (whole, whole_tuned))
    for what in ("full_precision", "rounded_to_nearest"):
        assert first["metrics"][what] == second["metrics"][what]
    tuned = torch.load(whole_tuned / "tuned.pt", weights_only=True)["layers"]
    for pack in packs_of(whole_tuned).values():
        for path, layer in pack["layers"].items():
            assert torch.equal(layer["codes"], tuned[path]["codes"])
    before = torch.load(whole_tuned / "network.pt", weights_only=True)
    after = torch.load(whole_tuned / "tuned.pt", weights_only=True)["biases"]
    assert after.keys() == {key.removesuffix(".layer.bias") for key in before if key.endswith(".layer.bias")}
    assert any(not torch.equal(bias, before[f"{path}.layer.bias"]) for path, bias in after.items())


def test_a_resumed_run_ends_in_the_network_that_loads(whole_tuned, tmp_path, monkeypatch):
    prepared, original = [], api.prepare_for
    monkeypatch.setattr(api, "prepare_for", lambda *args: prepared.append(original(*args)) or prepared[-1])
    with monkeypatch.context() as patch:
        kill_at_file(patch, "tuned.pt", after=True)
        with pytest.raises(Killed):
            run_tuned(tmp_path / "run")
    run_tuned(tmp_path / "run")
    chain = prepared[-1].chain
    switch(chain.layers.values(), "hard", activations=True)
    x = torch.randn(9, 3, 8, 8)
    for folder in (tmp_path / "run", whole_tuned):
        assert torch.equal(pack_ptq.load(folder, network=TinyNet())(x), chain.network(x))


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


def test_every_tensor_file_loads_with_weights_only(whole_tuned):
    files = list(whole_tuned.rglob("*.pt"))
    assert len(files) == UNITS + 4
    for path in files:
        torch.load(path, weights_only=True)


def test_other_weights_data_or_settings_are_refused_by_name(tmp_path):
    tiny(tmp_path / "run")
    tiny(tmp_path / "run")
    with pytest.raises(UserError, match=r"model \(other weights\); allowed"):
        tiny(tmp_path / "run", seed=1)
    with pytest.raises(UserError, match=r"data \(other samples\); allowed"):
        tiny(tmp_path / "run", samples=1)
    with pytest.raises(UserError, match=r"packing\.class_path .*HessianPacking.* now"):
        tiny(tmp_path / "run", packing=HessianPacking())
