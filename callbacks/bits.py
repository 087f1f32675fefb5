"""Assign bits to packs when the packs are known."""

import lightning as L

from pack_ptq.bit_groups import BitGroup, bit_groups
from pack_ptq.bits import plan_bits
from pack_ptq.callbacks.packing import Packing
from pack_ptq.graph.chain import Chain
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.types import BitGranularity, BitPlan, MixedPrecision, Recipe, Unit


class BitAssignment(L.Callback):
    """Turns packs into a bit plan; a rule is a subclass with the one method `pack_bits`, or, finer, `group_bits`.

    The result is in `plan`. A rule that only looks at the packs comes after the packing callback in the same pass. One
    that measures something on the packs gets a pass of its own, with `units` already there.

    Attributes:
        granularity: What has bits of its own.
        needs_pass: Whether the rule wants the calibration samples once more, when the packs are known.
        units: Of the chain: the stem, the packs, the head.
        mixed: How packs came to different bits, if the rule tells.
    """

    granularity: BitGranularity = "pack"
    needs_pass = False

    def __init__(self) -> None:
        self.recipe = Recipe()
        self.units: list[Unit] = []
        self.plan: BitPlan | None = None
        self.mixed: MixedPrecision | None = None

    def pack_bits(self, units: list[Unit]) -> list[tuple[int, int]]:
        """Give weight and activation bits of every unit."""
        raise NotImplementedError

    def group_bits(self, chain: Chain, groups: list[BitGroup]) -> list[tuple[int, int]]:
        """Give weight and activation bits of every group; with packs they are the units."""
        return self.pack_bits(self.units)

    def on_validation_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Assign bits to the units."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.units = next((c.units for c in callbacks if isinstance(c, Packing)), self.units)
        groups = bit_groups(module.chain, self.units, self.granularity)
        layers, operands = [group.layers for group in groups], [group.operands for group in groups]
        self.plan = plan_bits(layers, self.group_bits(module.chain, groups), self.recipe, operands)


class UniformBits(BitAssignment):
    """The recipe's bits for every pack."""

    def pack_bits(self, units: list[Unit]) -> list[tuple[int, int]]:
        """Give the recipe's bits."""
        return [(self.recipe.weight.bits, self.recipe.activation.bits)] * len(units)
