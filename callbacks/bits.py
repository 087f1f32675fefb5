"""Assign bits to packs when the packs are known."""

import lightning as L

from pack_ptq.bit_groups import bit_groups
from pack_ptq.bits import plan_bits
from pack_ptq.callbacks.packing import Packing
from pack_ptq.graph.chain import Chain
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.types import BitPlan, MixedPrecision, Recipe, Unit


class BitAssignment(L.Callback):
    """Turns packs into a bit plan; a rule is a subclass with the one method `pack_bits`, or, finer, `bit_plan`.

    The result is in `plan`. A rule that only looks at the packs comes after the packing callback in the same pass. One
    that measures something on the packs gets a pass of its own, with `units` already there.

    Attributes:
        needs_pass: Whether the rule wants the calibration samples once more, when the packs are known.
        units: Of the chain: the stem, the packs, the head.
        mixed: How packs came to different bits, if the rule tells.
    """

    needs_pass = False

    def __init__(self) -> None:
        self.recipe = Recipe()
        self.units: list[Unit] = []
        self.plan: BitPlan | None = None
        self.mixed: MixedPrecision | None = None

    def pack_bits(self, units: list[Unit]) -> list[tuple[int, int]]:
        """Give weight and activation bits of every unit."""
        raise NotImplementedError

    def bit_plan(self, chain: Chain) -> BitPlan:
        """Spread the bits of every unit over its layers."""
        groups = bit_groups(chain, self.units)
        bits = self.pack_bits(self.units)
        return plan_bits([group.layers for group in groups], bits, self.recipe, [group.operands for group in groups])

    def on_validation_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Assign bits to the units."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.units = next((c.units for c in callbacks if isinstance(c, Packing)), self.units)
        self.plan = self.bit_plan(module.chain)


class UniformBits(BitAssignment):
    """The recipe's bits for every pack."""

    def pack_bits(self, units: list[Unit]) -> list[tuple[int, int]]:
        """Give the recipe's bits."""
        return [(self.recipe.weight.bits, self.recipe.activation.bits)] * len(units)
