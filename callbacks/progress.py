"""Show how far the run is and how long it will still take."""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from tqdm import tqdm

from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.types import Unit, UnitResult


class RunProgress(L.Callback):
    """A bar over the units and one over the steps of the fit at work, each with its remaining time.

    Where the output is no terminal, every finished unit is a line instead.

    Args:
        units: All units of the run.
        steps: Steps of each fit.
        enabled: Whether to show anything; only one process should.
    """

    def __init__(self, units: list[Unit], steps: int, enabled: bool = True) -> None:
        self.count, self.done, self.fitted = len(units), 0, 0
        self.lines = enabled and not sys.stderr.isatty()
        hidden = not enabled or self.lines
        self.began = time.perf_counter()
        self.units = tqdm(total=len(units), desc="packs", unit="pack", disable=hidden, position=0)
        self.steps = tqdm(total=steps, unit="step", leave=False, disable=hidden, position=1)

    def begin(self, unit: Unit) -> None:
        """Turn to the next unit."""
        self.steps.reset()
        self.steps.set_description(unit.name)

    def on_fit_start(self, trainer: L.Trainer, module: PackReconstruction) -> None:  # type: ignore[override]
        """Turn to the part that is fitted, which may be one layer of the unit."""
        self.steps.reset()
        self.steps.set_description(module.label)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Count a step."""
        self.steps.update()

    def finish(self, result: UnitResult, is_new: bool) -> None:
        """Count a unit; one that an earlier run has finished says nothing about the remaining time."""
        self.done += 1
        self.fitted += is_new
        if self.lines:
            passed = time.perf_counter() - self.began
            left = timedelta(seconds=round(passed / max(1, self.fitted) * (self.count - self.done)))
            fate = (
                "kept as rounded to nearest" if not result.accepted else "fitted" if is_new else "from the run folder"
            )
            print(
                f"[{self.done}/{self.count}] {result.name}: {fate}, output error {result.nearest_loss:.4g} -> "
                f"{result.final_loss:.4g}, {result.seconds:.0f} s; about {left} left",
                flush=True,
            )
        elif not self.units.disable and result.steps and not result.accepted:
            self.units.write(f"{result.name}: the fit ended worse than rounding to nearest, which is kept")
        self.units.update()

    def close(self) -> None:
        """Leave the screen in order."""
        self.steps.close()
        self.units.close()


class StepProgress(L.Callback):
    """One bar over the steps of a fit; nothing where the output is no terminal.

    Args:
        what: Name of the fit.
        steps: Its steps.
        enabled: Whether to show anything; only one process should.
    """

    def __init__(self, what: str, steps: int, enabled: bool = True) -> None:
        hidden = not enabled or not sys.stderr.isatty()
        self.steps = tqdm(total=steps, desc=what, unit="step", leave=False, disable=hidden)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Count a step."""
        self.steps.update()

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Leave the screen in order."""
        self.steps.close()
