"""The whole network under `validate` (calibration samples) and `test` (test samples)."""

import lightning as L
from torch import Tensor, nn

from pack_ptq.graph.chain import Chain


class WholeNetwork(L.LightningModule):
    """Runs forward passes for the callbacks, which do the work.

    Args:
        chain: The prepared network.
        forward_in_validation: Whether `validate` runs the network, as watching observers need; scoring runs it itself.
        reference: The full-precision network that a test compares with, if any.
    """

    def __init__(self, chain: Chain, forward_in_validation: bool = False, reference: nn.Module | None = None) -> None:
        super().__init__()
        self.chain = chain
        self.network, self.reference = chain.network, reference
        self.forward_in_validation = forward_in_validation

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        """Give the output on a calibration batch."""
        return self.network(batch[0]) if self.forward_in_validation else None

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Give the output on a test batch."""
        return self.network(batch[0])
