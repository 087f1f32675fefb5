"""What is kept and shown of the last pass, and of fits that end worse or were not made."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import ttest_rel

from pack_ptq.callbacks import KeepBestTuning, RunProgress, StepProgress, TuningMonitor, keep_best_tuning
from pack_ptq.callbacks.keep_best_tuning import Iterate
from pack_ptq.types import Unit, UnitResult

NAN = float("nan")


def test_tuning_shows_where_it_stands() -> None:
    points: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: points.append((metrics, step)))
    module: Any = SimpleNamespace(steps=24, earlier_steps=3)
    for trainer in (SimpleNamespace(logger=None), SimpleNamespace(logger=logger)):
        for step in range(24):
            outputs = {"loss": torch.tensor(9.0), "divergence": torch.tensor(step / 8)}
            TuningMonitor().on_train_batch_end(trainer, module, outputs, None, step)  # type: ignore[arg-type]
    assert points == [({"tuning/divergence": step / 8}, 3 + step) for step in (0, 10, 20, 23)]


def judged(points: list[tuple[dict[str, float], int]], rows: list[list[float]], scales: list[float]) -> KeepBestTuning:
    """Let a pass of as many measurements run, each with these divergences of its samples and this scale."""
    found = iter(rows)
    state = SimpleNamespace(scale=torch.tensor(1.0), seen=0)

    def divergences(data: Any, held_out: Any) -> torch.Tensor:
        assert (data, held_out) == ("data", "held out")
        state.seen += 1
        return torch.tensor(next(found), dtype=torch.float64)

    count = len(rows) - 1
    module: Any = SimpleNamespace(
        quantizers=[state], divergences=divergences, learned=lambda: state.seen, steps=2 * count,
        earlier_steps=7, rate_share=1.0,
        spec=SimpleNamespace(evaluations=count),
    )  # fmt: skip
    trainer: Any = SimpleNamespace(
        logger=SimpleNamespace(log_metrics=lambda metrics, step: points.append((metrics, step)))
    )
    best = KeepBestTuning("data", "held out")  # type: ignore[arg-type]
    best.begin(module)
    for step in range(2 * count):
        state.scale.fill_(scales[max(0, step - count + 1)])
        best.on_train_batch_end(trainer, module, None, None, step)
    return best


def test_iterates_are_shown_and_those_without_sense_are_never_kept() -> None:
    points: list[tuple[dict[str, float], int]] = []
    best = judged(points, [[4.0, 4.0], [3.0, 3.0], [1.0, 1.0], [2.0, 2.0], [NAN, 0.0]], [1, 1, -1, 1, 1])
    assert best.start.mean == 4
    assert (best.chosen().mean, best.chosen().learned) == (2, 4), "not the one with a scale below 0, nor no number"
    key = "tuning/held_out_divergence"
    assert points[:3] == [({key: 3.0}, 11), ({key: 1.0}, 12), ({key: 2.0}, 13)]


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([[2, 2, 2, 2], [3, 3, 3, 3], [3, 1, 2, 3]], 3),  # the best, which differs from the start by chance
        ([[2, 2, 2, 2], [2, 2, 1, 9], [2, 2, 2, 9]], 2),  # one sample decides: within two standard errors
        ([[4, 4, 4, 4], [2, 2, 2, 2], [3, 3, 4, 3]], 2),  # the best
        ([[1, 1, 1, 1], [2, 2, 2, 3], [3, 3, 4, 3]], 1),  # the start, on which all agree
        ([[2] * 12, [1.9] * 11 + [500]], 1),  # one sample is far off
        ([[1], [2]], 2),  # of a single sample nothing is known about chance
        ([[1], [2.1]], 1),  # but twice as much is too much
        ([[2, 2]], 1),  # nothing else was sound
    ],
)
def test_the_best_is_kept_unless_the_start_is_better_beyond_chance(rows: list[list[float]], kept: int) -> None:
    best = judged([], rows, [1.0] * len(rows))
    assert best.chosen().learned == kept
    assert (best.chosen() is best.start) == (kept == 1)


def iterate(divergences: torch.Tensor) -> Iterate:
    return Iterate(divergences, divergences.mean().item(), ([], []), 1.0)


@pytest.mark.parametrize("seed", range(8))
def test_beyond_chance_is_a_paired_t_of_two(seed: int) -> None:
    noise = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    earlier, later = noise[0] + 2, noise[1] + 2.2  # less than half of neither
    assert iterate(earlier).beats(iterate(later)) == (ttest_rel(later, earlier).statistic > 2)


@pytest.mark.parametrize("seed", range(8))
def test_processes_judge_by_all_their_samples(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    earlier, later = noise[0] + 2, noise[1] + 2.2
    alone = iterate(earlier).beats(iterate(later))
    gain = (later - earlier)[4:]
    other = torch.stack([torch.ones_like(gain), gain, gain.square()], 1).sum(0)
    monkeypatch.setattr(keep_best_tuning, "all_reduce", lambda sums: sums + other)
    assert iterate(earlier[:4]).beats(iterate(later[:4])) == alone


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
