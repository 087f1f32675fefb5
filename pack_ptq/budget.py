"""Budgets of bits for a whole network, as whole numbers that the solver keeps exactly (METHOD P4)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, isfinite
from typing import Literal

from pack_ptq.bits import CANDIDATES, LayerSize, plan_bits, spending
from pack_ptq.errors import UserError, refuse
from pack_ptq.types import PackSensitivity, Recipe, Record

BudgetName = Literal["iso", "paper", "custom"]
# What a limit bounds among the numbers of `spending`; an average is its total over the elements.
TOTALS = {
    "weight_average": "weight_bits",
    "activation_average": "activation_bits",
    "weight_bytes": "weight_bytes",
    "bit_operations": "bit_operations",
}


@dataclass(frozen=True)
class BitBudget(Record):
    """Upper limits for the whole network, the first and the last layer included; any may be missing.

    Attributes:
        weight_average: Bits of a weight, weighted by element counts.
        activation_average: Bits of a layer's input element, likewise; an input that is not quantized counts 32.
        weight_bytes: Codes of all weights, packed layer by layer.
        bit_operations: Sum over layers of MACs x weight bits x activation bits, for one sample.
    """

    weight_average: float | None = None
    activation_average: float | None = None
    weight_bytes: int | None = None
    bit_operations: int | None = None

    def check(self, key: str) -> None:
        """Refuse limits that are no positive numbers, naming them below `key`.

        Raises:
            UserError: A limit is 0, negative or not finite.
        """
        for name in TOTALS:
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise refuse(f"{key}.{name}", value, "a number above 0")

    def limits(self, sizes: Mapping[str, LayerSize]) -> dict[str, int]:
        """Give the limits as totals, rounded down; 3.2 bits are taken as written, not as the nearest binary number."""
        given = {name: getattr(self, name) for name in TOTALS if getattr(self, name) is not None}
        return {TOTALS[name]: floor(Fraction(str(value)) * elements(name, sizes)) for name, value in given.items()}


@dataclass(frozen=True)
class MixedUnit:
    """A unit, or a part of it with bits of its own, to the eyes of the solver.

    Attributes:
        layers: Paths, in execution order.
        sensitivity: Of a pack, or a part of it; units without it keep the recipe's bits.
        operands: Names of the operands of its products.
    """

    layers: tuple[str, ...]
    sensitivity: PackSensitivity | None = None
    operands: tuple[str, ...] = ()


def elements(limit: str, sizes: Mapping[str, LayerSize]) -> int:
    """Give the number by which a total is divided to the named limit: elements for averages, 1 for the others."""
    if limit == "weight_average":
        return sum(size.weights for size in sizes.values())
    return sum(size.inputs for size in sizes.values()) if limit == "activation_average" else 1


def budget_limits(
    units: Sequence[MixedUnit], sizes: Mapping[str, LayerSize], recipe: Recipe, name: BudgetName, explicit: BitBudget
) -> dict[str, int]:
    """Give the limits on the totals of `spending`.

    Args:
        units: All, in execution order.
        sizes: Of every layer.
        recipe: Uniform bits and the protocol.
        name: `iso` bounds both averages by those of the uniform setting, `paper` by those of packs half-way between
            the paper's middle and highest candidate (3.5 bits for 3), `custom` sets no limit of its own.
        explicit: Replaces a limit on weights or on activations, and adds the others.
    """

    def spent(pick: Callable[[Iterable[int]], int] | None) -> dict[str, int]:
        bits = [
            (recipe.weight.bits, recipe.activation.bits)
            if pick is None or unit.sensitivity is None
            else (pick(CANDIDATES[recipe.weight.bits]), pick(CANDIDATES[recipe.activation.bits]))
            for unit in units
        ]
        layers, operands = [unit.layers for unit in units], [unit.operands for unit in units]
        return spending(plan_bits(layers, bits, recipe, operands), sizes)

    limits: dict[str, int] = {}
    if name != "custom":
        low, high = (spent(None), spent(None)) if name == "iso" else (spent(_middle), spent(max))
        limits = {total: (low[total] + high[total]) // 2 for total in ("weight_bits", "activation_bits")}
    if explicit.weight_average is not None or explicit.weight_bytes is not None:
        limits.pop("weight_bits", None)
    return limits | explicit.limits(sizes)


def _middle(widths: Iterable[int]) -> int:
    widths = sorted(widths)
    return widths[len(widths) // 2]


def out_of_reach(
    key: str,
    smallest: Mapping[str, int],
    limits: Mapping[str, int],
    explicit: BitBudget,
    sizes: Mapping[str, LayerSize],
) -> UserError:
    """Word the refusal of limits that the candidates cannot keep, with what they can reach."""
    messages = []
    for name in (name for name, total in TOTALS.items() if total in smallest):
        count, given = elements(name, sizes), getattr(explicit, name)
        least, limit = Fraction(smallest[TOTALS[name]], count), limits[TOTALS[name]] / count
        reachable = least.numerator if count == 1 else ceil(least * 10_000) / 10_000
        allowed = f"{reachable} or more, the smallest that the candidates reach"
        messages.append(str(refuse(f"{key}.{name}", round(limit, 4) if given is None else given, allowed)))
    return UserError("; ".join(messages))
