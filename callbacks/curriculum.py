"""Keep a curriculum's losses close to what the fit has reached."""

import lightning as L

from pack_ptq.modules.easy_rows import EasyRows
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.reconstruction import PackReconstruction


class Curriculum(L.Callback):
    """Measures the loss of every row before the fit and at evenly spaced steps in it.

    Each time costs a forward pass over all rows, about a third of as many steps as there are batches in them.

    Args:
        data: What the pack is fitted to.
        rows: Whose losses are set.
        times: How often, the start included; 1 or more.
    """

    def __init__(self, data: PackData, rows: EasyRows, times: int = 4) -> None:
        self.data, self.rows = data, rows
        self.steps = {round(rows.steps * i / times) for i in range(1, times)}

    def on_train_start(self, trainer: L.Trainer, module: PackReconstruction) -> None:  # type: ignore[override]
        """Measure at the start, before a batch is drawn."""
        self.rows.errors = module.hard_errors(self.data)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: PackReconstruction, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure if it is time to."""
        if batch_idx + 1 in self.steps:
            self.rows.errors = module.hard_errors(self.data)
