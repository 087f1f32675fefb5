"""Assign bits to packs when the packs are known."""

import lightning as L

from pack_ptq.bits import plan_bits
from pack_ptq.callbacks.packing import Packing
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.types import BitPlan, Recipe, Unit


class BitAssignment(L.Callback):
    """Turns packs into a bit plan; a rule is a subclass with the one method `pack_bits`.

    The result is in `plan`. It must come after the packing callback.
    """

    def __init__(self) -> None:
        self.recipe = Recipe()
        self.plan: BitPlan | None = None

    def pack_bits(self, units: list[Unit]) -> list[tuple[int, int]]:
        """Give weight and activation bits of every unit."""
        raise NotImplementedError

    def on_validation_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Assign bits to the units of the packing callback."""
        units = next(c.units for c in trainer.callbacks if isinstance(c, Packing))  # type: ignore[attr-defined]
        layers = [list(module.chain.layers_of(unit.start, unit.stop)) for unit in units]
        self.plan = plan_bits(layers, self.pack_bits(units), self.recipe)


class UniformBits(BitAssignment):
    """The recipe's bits for every pack."""

    def pack_bits(self, units: list[Unit]) -> list[tuple[int, int]]:
        """Give the recipe's bits."""
        return [(self.recipe.weight.bits, self.recipe.activation.bits)] * len(units)
