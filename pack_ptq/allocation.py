"""Choose one option per pack at the smallest total cost within limits, exactly: a multiple-choice knapsack as an
integer program (METHOD P4). It sees only numbers.
"""  # noqa: D205

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

LARGEST_COST = 1e6  # HiGHS ends within 1e-6 of the optimum
TIE = 1e-8  # of the largest cost; totals that are closer count as equal
MOST_POINTS = 25


@dataclass(frozen=True)
class Options:
    """What one pack may become.

    Attributes:
        costs: Of each option, in any unit.
        spending: Of each option, whole numbers by resource.
    """

    costs: tuple[float, ...]
    spending: tuple[Mapping[str, int], ...]


class InfeasibleError(Exception):
    """No choice keeps the limits.

    Attributes:
        smallest: What the violated resources need at least.
    """

    def __init__(self, smallest: dict[str, int]) -> None:
        super().__init__(f"no choice keeps the limits; at least {smallest} is needed")
        self.smallest = smallest


def total_cost(options: Sequence[Options], choice: Sequence[int]) -> float:
    """Give the cost of one option per pack."""
    return fsum(pack.costs[index] for pack, index in zip(options, choice, strict=True))


def total_spending(options: Sequence[Options], choice: Sequence[int], resource: str) -> int:
    """Give what one option per pack spends of a resource."""
    return sum(pack.spending[index][resource] for pack, index in zip(options, choice, strict=True))


def allocate(options: Sequence[Options], limits: Mapping[str, int], prefer: str = "weight_bytes") -> list[int]:
    """Give the index of each pack's option: least total cost, and among equal costs the least of one resource.

    Args:
        options: Of every pack.
        limits: Largest total spending by resource.
        prefer: The resource that decides between equal costs.

    Raises:
        InfeasibleError: The limits cannot be kept.
    """
    if not all(np.isfinite(pack.costs).all() for pack in options):
        raise ValueError("costs must be finite")
    costs, bytes_ = _from_least([pack.costs for pack in options]), _from_least(_column(options, prefer))
    ranges = [max(row) - min(row) for row in _column(options, prefer)]
    tie = TIE * (costs.max() or 1) / (sum(ranges) or 1)
    choice = _solve(options, costs + tie * bytes_, limits)
    if choice is None:
        raise InfeasibleError(_smallest(options, limits))
    return choice


def pareto_front(
    options: Sequence[Options], limits: Mapping[str, int], resource: str = "weight_bytes", also: Sequence[int] = ()
) -> list[list[int]]:
    """Give the choices that no other one beats in both cost and a resource, from little to much of the resource.

    Args:
        options: Of every pack.
        limits: On other resources; they must be possible to keep.
        resource: What is swept over, at most 25 limits from the least to the most.
        also: Limits that must be among them.
    """
    column = _column(options, resource)
    least, most = (sum(map(end, column)) for end in (min, max))
    steps = MOST_POINTS - 1 - len(also)
    sweep = sorted({*(least + (most - least) * i // max(1, steps) for i in range(steps + 1)), *also})
    front: list[list[int]] = []
    for limit in sweep:
        try:
            choice = allocate(options, {**limits, resource: limit}, resource)
        except InfeasibleError:
            continue
        if not front or total_cost(options, choice) < total_cost(options, front[-1]):
            front.append(choice)
    return front


def _column(options: Sequence[Options], resource: str) -> list[list[int]]:
    return [[spent[resource] for spent in pack.spending] for pack in options]


def _smallest(options: Sequence[Options], limits: Mapping[str, int]) -> dict[str, int]:
    """Give what violated resources need: each by itself, or, where only all together are too tight, beside the rest."""
    alone = {name: sum(map(min, _column(options, name))) for name in limits}
    if violated := {name: least for name, least in alone.items() if least > limits[name]}:
        return violated
    needed = dict(alone)
    for name in limits:
        others = {other: limit for other, limit in limits.items() if other != name}
        choice = _solve(options, _from_least(_column(options, name)), others)
        if choice is not None:
            needed[name] = total_spending(options, choice, name)
    return {name: least for name, least in needed.items() if least > limits[name]} or needed


def _solve(options: Sequence[Options], objective: np.ndarray, limits: Mapping[str, int]) -> list[int] | None:
    """Minimise the sum of the objective, which holds one number per option, within the limits.

    HiGHS works within tolerances. A solution is therefore checked exactly, and if it breaks a limit, it alone is
    forbidden and the program solved again: what comes out is optimal among the choices that keep the limits.
    """
    ends = np.cumsum([0, *(len(pack.costs) for pack in options)])
    one_each = np.zeros((len(options), len(objective)))
    for pack, (start, stop) in enumerate(pairwise(ends)):
        one_each[pack, start:stop] = 1
    rows = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        columns = _column(options, name)
        column, room = _from_least(columns), limit - sum(map(min, columns))
        if room < 0:
            return None
        unit = gcd(*map(int, column)) or 1
        rows.append(_row(column / unit, room // unit + 0.5))  # half a unit off what whole numbers can reach
    objective = objective * (LARGEST_COST / (objective.max() or 1))
    while True:
        result = milp(
            objective,
            integrality=np.ones_like(objective),
            bounds=Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None
        choice = [int(part.argmax()) for part in np.split(result.x, ends[1:-1])]
        if all(total_spending(options, choice, name) <= limit for name, limit in limits.items()):
            return choice
        forbidden = np.zeros_like(objective)
        forbidden[ends[:-1] + choice] = 1
        rows.append(LinearConstraint(forbidden[None], -np.inf, len(options) - 1))


def _from_least(columns: Sequence[Sequence[float]]) -> np.ndarray:
    """Count each pack from its least option on, which keeps the numbers small and the optimum the same."""
    return np.array([value - min(row) for row in columns for value in row], dtype=float)


def _row(column: np.ndarray, room: float) -> LinearConstraint:
    """Scale a row to coefficients of at most 1."""
    scale = 1 / (column.max() or 1)
    return LinearConstraint(scale * column[None], -np.inf, scale * room)
