"""Where fits run, what they draw from, and what shows them."""

from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger

from pack_ptq.types import Hardware


@dataclass(frozen=True)
class Workplace:
    """What all fits of a run share besides the network, the data and the recipe.

    Attributes:
        seed: Of all random choices, 0 or more.
        hardware: Where the fits run.
        logger: For TensorBoard.
        folder: For the memory-mapped files of large caches; the system's temporary folder if none.
        show: Whether to show progress bars.
        callbacks: Of every fit, besides its own.
    """

    seed: int = 0
    hardware: Hardware = field(default_factory=Hardware)
    logger: Logger | None = None
    folder: Path | None = None
    show: bool = False
    callbacks: tuple[L.Callback, ...] = ()
