"""Give packs different bits by their measured sensitivities (METHOD P4). It sees only numbers."""

from collections.abc import Mapping, Sequence
from itertools import product

from pack_ptq.allocation import InfeasibleError, Options, allocate, pareto_front, total_cost, total_spending
from pack_ptq.bits import LayerSize, protocol_bits, spending, unit_bits
from pack_ptq.budget import TOTALS, BitBudget, BudgetName, MixedUnit, budget_limits, elements, out_of_reach
from pack_ptq.types import MixedPrecision, ParetoPoint, Recipe

KEY = "bits.init_args"


def mix_bits(
    units: Sequence[MixedUnit],
    sizes: Mapping[str, LayerSize],
    recipe: Recipe,
    name: BudgetName = "iso",
    explicit: BitBudget = BitBudget(),  # noqa: B008
) -> tuple[list[tuple[int, int]], MixedPrecision]:
    """Choose the bits that add the least predicted KL within a budget, and find the Pareto front around the choice.

    The prediction is the sum of the sensitivities over packs, and over weights and activations.

    Args:
        units: All, in execution order; those without sensitivity keep the recipe's bits.
        sizes: Of every layer.
        recipe: Uniform bits and the protocol.
        name: Of the budget, as `budget_limits` takes it.
        explicit: Its explicit part.

    Returns:
        Weight and activation bits of every unit, and how they were found.

    Raises:
        UserError: The candidates cannot keep the budget; the message names what they can reach.
    """
    choices = [_choices(unit, recipe) for unit in units]
    options = _options(units, choices, sizes, recipe)
    limits = budget_limits(units, sizes, recipe, name, explicit)
    try:
        chosen = allocate(options, limits)
    except InfeasibleError as error:
        raise out_of_reach(KEY, error.smallest, limits, explicit, sizes) from error
    bits = [pairs[index] for pairs, index in zip(choices, chosen, strict=True)]
    packs = [(unit.sensitivity, pair) for unit, pair in zip(units, bits, strict=True) if unit.sensitivity is not None]
    return bits, MixedPrecision(
        {sensitivity.name: pair for sensitivity, pair in packs},
        total_cost(options, chosen),
        name,
        {limit: limits[total] / elements(limit, sizes) for limit, total in TOTALS.items() if total in limits},
        tuple(sensitivity for sensitivity, _ in packs),
        _pareto(options, limits, chosen, sizes),
    )


def _choices(unit: MixedUnit, recipe: Recipe) -> list[tuple[int, int]]:
    if unit.sensitivity is None:
        return [(recipe.weight.bits, recipe.activation.bits)]
    return list(product(unit.sensitivity.weight, unit.sensitivity.activation))


def _options(
    units: Sequence[MixedUnit],
    choices: Sequence[Sequence[tuple[int, int]]],
    sizes: Mapping[str, LayerSize],
    recipe: Recipe,
) -> list[Options]:
    paths = [path for unit in units for path in unit.layers]
    protocol = protocol_bits(paths[0], paths[-1], recipe)
    options = []
    for unit, pairs in zip(units, choices, strict=True):
        found = unit.sensitivity
        costs = [0.0 if found is None else found.weight[w] + found.activation[a] for w, a in pairs]
        spent = [spending(unit_bits(unit.layers, pair, protocol, unit.operands), sizes) for pair in pairs]
        options.append(Options(tuple(costs), tuple(spent)))
    return options


def _pareto(
    options: Sequence[Options], limits: Mapping[str, int], chosen: Sequence[int], sizes: Mapping[str, LayerSize]
) -> tuple[ParetoPoint, ...]:
    """Give the front over bytes of weights, with the run's limits on activations, through the choice of the run."""
    others = {name: limit for name, limit in limits.items() if name in ("activation_bits", "bit_operations")}
    through = total_spending(options, chosen, "weight_bytes")
    points = []
    for choice in pareto_front(options, others, "weight_bytes", also=[through]):
        spent = {name: total_spending(options, choice, name) for name in ("weight_bytes", "weight_bits")}
        average = spent["weight_bits"] / elements("weight_average", sizes)
        points.append(ParetoPoint(spent["weight_bytes"], average, total_cost(options, choice)))
    return tuple(points)
