"""Give each pack, or each layer, its own bits within a budget (METHOD P4)."""

from dataclasses import replace
from typing import Any, get_args

import lightning as L

from pack_ptq.bit_groups import BitGroup
from pack_ptq.budget import BitBudget, BudgetName, MixedUnit
from pack_ptq.callbacks.bits import BitAssignment
from pack_ptq.distributed import share_left
from pack_ptq.errors import refuse
from pack_ptq.graph.chain import Chain
from pack_ptq.mixed import KEY, mix_bits
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.sensitivity import SensitivityMeter
from pack_ptq.types import BITS, BitGranularity


class MixedBits(BitAssignment):
    """Measures how each layer's weights and inputs bear each candidate width, and spends a budget of bits exactly.

    Args:
        budget: `iso` spends no more bits on average than the uniform recipe, for weights and for activations; `paper`
            as many as the original (3.5 for 3); `custom` only what the limits below say.
        granularity: Whether every `layer` (and product of attention) has bits of its own, or, as in the paper, every
            `pack`.
        weight_average: Most bits of a weight on average over the whole network; replaces the budget's own limit.
        activation_average: The same for the inputs of layers.
        weight_bytes: Most bytes of the packed weights; replaces the budget's own limit on weights.
        bit_operations: Most MACs x weight bits x activation bits of one sample.
        weight_candidates: Widths to choose from, 2 to 8; if not given, for packs those of the paper around the recipe's
            bits, for layers from 2 below to 3 above.
        activation_candidates: The same for the inputs of layers; one width makes them uniform.
        num_samples: Calibration samples to measure on, over all processes together; all of them if null.
    """

    needs_pass = True

    def __init__(
        self,
        budget: BudgetName = "iso",
        granularity: BitGranularity = "layer",
        weight_average: float | None = None,
        activation_average: float | None = None,
        weight_bytes: int | None = None,
        bit_operations: int | None = None,
        weight_candidates: list[int] | None = None,
        activation_candidates: list[int] | None = None,
        num_samples: int | None = 256,
    ) -> None:
        super().__init__()
        self.granularity, self.budget = granularity, budget
        self.weight_average, self.activation_average = weight_average, activation_average
        self.weight_bytes, self.bit_operations = weight_bytes, bit_operations
        self.weight_candidates, self.activation_candidates = weight_candidates, activation_candidates
        self.num_samples = num_samples
        self.limits = BitBudget(weight_average, activation_average, weight_bytes, bit_operations)
        self.limits.check(KEY)
        self._check()
        self._meter: SensitivityMeter | None = None

    def _check(self) -> None:
        for name, kind in (("granularity", BitGranularity), ("budget", BudgetName)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise refuse(f"{KEY}.{name}", value, ", ".join(get_args(kind)))
        if self.budget == "custom" and self.limits == BitBudget():
            raise refuse(f"{KEY}.budget", self.budget, f"custom with one of {', '.join(self.limits.to_json())}")
        for name in ("weight_candidates", "activation_candidates"):
            widths = getattr(self, name)
            if widths is not None and (not widths or any(width not in BITS for width in widths)):
                raise refuse(f"{KEY}.{name}", widths, "one or more of 2 to 8")
        if self.num_samples is not None and self.num_samples < 1:
            raise refuse(f"{KEY}.num_samples", self.num_samples, "1 or more, or null for all")

    def on_validation_start(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Search the ranges of all candidates and begin with empty sums."""
        widths = (self.weight_candidates, self.activation_candidates)
        self._meter = SensitivityMeter(module.chain, self.units, self.recipe, *widths, self.granularity)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        module: WholeNetwork,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch, as far as this process's share of the samples goes."""
        assert self._meter is not None
        share = share_left(self.num_samples, trainer.global_rank, trainer.world_size, self._meter.num_samples)
        if len(x := batch[0][:share]):
            self._meter.update(x)

    def on_validation_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Assign bits and show the Pareto front in TensorBoard."""
        super().on_validation_end(trainer, module)
        self._meter = None
        if trainer.logger is not None and self.mixed is not None:
            for point in self.mixed.pareto:
                trainer.logger.log_metrics({"pareto/predicted_kl": point.predicted_kl}, step=point.weight_bytes)

    def group_bits(self, chain: Chain, groups: list[BitGroup]) -> list[tuple[int, int]]:
        """Solve for the bits of every pack or layer; the stem and the head keep the recipe's."""
        assert self._meter is not None
        found = {each.name: each for each in self._meter.compute()}
        mixed = [
            MixedUnit(group.layers, found.get(group.name) if group.free else None, group.operands) for group in groups
        ]
        bits, solution = mix_bits(mixed, self._meter.sizes(), self.recipe, self.budget, self.limits)
        self.mixed = replace(solution, granularity=self.granularity)
        return bits
