"""Watch activations while the calibration samples pass through."""

import lightning as L

from pack_ptq.calibration import merge_observers, watch
from pack_ptq.modules.network import WholeNetwork


class Observation(L.Callback):
    """Lets the observers see one of the two passes over the calibration samples.

    Args:
        what: `extremes` in the first pass, `values` in the second.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def on_validation_start(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Begin to watch."""
        watch(module.chain, self.what)

    def on_validation_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Stop, merge over the processes, and refuse NaN by the layer's name."""
        watch(module.chain, None)
        merge_observers(module.chain, self.what)
