"""Show how far the run is and how long it will still take."""

from typing import Any

import lightning as L
from tqdm import tqdm

from pack_ptq.types import Unit


class RunProgress(L.Callback):
    """A bar over the units of the chain and one over the steps of the fit at work, each with its remaining time.

    Args:
        units: All units of the run.
        steps: Steps of each fit.
        done: Units that an earlier run has finished.
        enabled: Whether to show anything; other processes than the first do not.
    """

    def __init__(self, units: list[Unit], steps: int, done: int = 0, enabled: bool = True) -> None:
        self.units = tqdm(total=len(units), initial=done, desc="packs", unit="pack", disable=not enabled, position=0)
        self.steps = tqdm(total=steps, unit="step", leave=False, disable=not enabled, position=1, mininterval=1)

    def begin(self, unit: Unit) -> None:
        """Turn to the next unit."""
        self.steps.reset()
        self.steps.set_description(unit.name)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Count a step."""
        self.steps.update()

    def finish(self, unit: Unit) -> None:
        """Count a unit."""
        self.units.update()

    def close(self) -> None:
        """Leave the screen in order."""
        self.steps.close()
        self.units.close()
