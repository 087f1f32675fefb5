"""What is kept and shown of the last pass, and of fits that end worse or were not made."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pack_ptq.callbacks import KeepBestTuning, RunProgress, StepProgress, TuningMonitor
from pack_ptq.types import Unit, UnitResult


def test_tuning_shows_where_it_stands() -> None:
    points: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: points.append((metrics, step)))
    module: Any = SimpleNamespace(steps=24)
    for trainer in (SimpleNamespace(logger=None), SimpleNamespace(logger=logger)):
        for step in range(24):
            TuningMonitor().on_train_batch_end(trainer, module, {"loss": torch.tensor(step / 8)}, None, step)  # type: ignore[arg-type]
    assert points == [({"tuning/divergence": step / 8}, step) for step in (0, 10, 20, 23)]


def test_the_best_on_held_out_samples_is_kept_and_shown() -> None:
    points: list[tuple[dict[str, float], int]] = []
    scale = torch.tensor(1.0)
    asked: list[tuple[Any, int]] = []
    divergences = iter([4.0, 3.0, 1.0, 2.0])

    def divergence(data: Any, count: int) -> float:
        asked.append((data, count))
        return next(divergences)

    quantizer = SimpleNamespace(scale=scale)
    module: Any = SimpleNamespace(quantizers=[quantizer], divergence=divergence, learned=lambda: [len(asked)])
    logger = SimpleNamespace(log_metrics=lambda metrics, step: points.append((metrics, step)))
    trainer: Any = SimpleNamespace(logger=logger)
    best = KeepBestTuning("data", 7, {2, 4, 6})  # type: ignore[arg-type]
    best.begin(module)
    assert (best.before, best.best, best.kept) == (4.0, 4.0, [1])
    for step in range(6):
        scale.fill_(-1.0 if step == 3 else 1.0)
        best.on_train_batch_end(trainer, module, None, None, step)
    assert asked == [("data", 7)] * 4
    assert (best.before, best.best, best.kept) == (4.0, 2.0, [4]), "not the one with a scale below 0"
    key = "tuning/held_out_divergence"
    assert points == [({key: 3.0}, 1), ({key: 1.0}, 3), ({key: 2.0}, 5)]


def shown(monkeypatch: pytest.MonkeyPatch, capsys: Any, terminal: bool, act: Any) -> str:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    act()
    return capsys.readouterr().err


@pytest.mark.parametrize(("terminal", "enabled"), [(True, True), (True, False), (False, True)])
def test_a_bar_over_steps_on_terminals_only(
    terminal: bool, enabled: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def act() -> None:
        bar = StepProgress("tuning", 3, enabled)
        for _ in range(3):
            bar.on_train_batch_end(None, None)  # type: ignore[arg-type]
        assert bar.steps.disable or bar.steps.n == 3
        bar.on_fit_end(None, None)  # type: ignore[arg-type]

    assert ("tuning" in shown(monkeypatch, capsys, terminal, act)) == (terminal and enabled)


@pytest.mark.parametrize("steps", [0, 5])
def test_only_a_fit_that_was_made_can_end_worse(steps: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def act() -> None:
        bars = RunProgress([Unit("stem", ("a",), 0, 1)], steps)
        bars.finish(UnitResult("a", ("a",), steps, 1.0, 1.0, False, 0.1), is_new=True)
        bars.close()
        err.append(capsys.readouterr())

    err: list[Any] = []
    shown(monkeypatch, capsys, True, act)
    assert ("ended worse" in err[0].out + err[0].err) == (steps > 0)
