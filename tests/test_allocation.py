"""The solver against exhaustive search."""

import random
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_ptq.allocation import (
    MOST_POINTS,
    InfeasibleError,
    Options,
    allocate,
    pareto_front,
    total_cost,
    total_spending,
)

RESOURCES = ("weight_bits", "activation_bits", "weight_bytes", "bit_operations")


def instance(draw: random.Random, packs: int, tied: bool = False) -> list[Options]:
    """Give packs of uneven size and sensitivity, with costs as integers of few values if they are to be tied."""
    options = []
    for _ in range(packs):
        weights, inputs = draw.randint(1, 2_000_000), draw.randint(1, 800_000)
        macs = draw.randint(weights, 10**9 + weights)
        costs, spending = [], []
        widths = [sorted(draw.sample(range(2, 9), draw.randint(1, 3))) for _ in range(2)]
        scales = [10 ** draw.uniform(-6, 1) for _ in range(2)]
        for w, a in product(*widths):
            noisy = scales[0] * 4**-w * draw.uniform(0.5, 1.5) + scales[1] * 4**-a * draw.uniform(0.5, 1.5)
            costs.append(float(draw.randint(0, 3)) if tied else noisy)
            numbers = (weights * w, inputs * a, -(-weights * w // 8), macs * w * a)
            spending.append(dict(zip(RESOURCES, numbers, strict=True)))
        options.append(Options(tuple(costs), tuple(spending)))
    return options


def ends(options: list[Options], resource: str) -> tuple[int, int]:
    columns = [[spent[resource] for spent in pack.spending] for pack in options]
    return sum(map(min, columns)), sum(map(max, columns))


def keeping(options: list[Options], limits: dict[str, int]) -> Iterator[tuple[int, ...]]:
    for choice in product(*[range(len(pack.costs)) for pack in options]):
        if all(total_spending(options, choice, name) <= limit for name, limit in limits.items()):
            yield choice


def tolerance(options: list[Options]) -> float:
    return 2e-8 * max(cost for pack in options for cost in pack.costs) + 1e-15


@pytest.mark.parametrize("seed", range(150))
def test_optimal_within_several_resources(seed: int) -> None:
    draw = random.Random(seed)
    options = instance(draw, draw.randint(1, 4))
    names = draw.sample(RESOURCES, draw.randint(0, 4))
    limits = {name: draw.randint(*ends(options, name)) for name in names}
    choice = allocate(options, limits)
    assert all(total_spending(options, choice, name) <= limit for name, limit in limits.items()), "exactly"
    best = min(total_cost(options, other) for other in keeping(options, limits))
    assert total_cost(options, choice) == pytest.approx(best, rel=0, abs=tolerance(options))


@pytest.mark.parametrize("seed", range(60))
def test_fewer_bytes_among_equal_costs(seed: int) -> None:
    draw = random.Random(seed)
    options = instance(draw, draw.randint(1, 4), tied=True)
    limits = {name: draw.randint(*ends(options, name)) for name in draw.sample(RESOURCES, 2)}
    choice = allocate(options, limits)
    best = min(
        (total_cost(options, other), total_spending(options, other, "weight_bytes"))
        for other in keeping(options, limits)
    )
    assert (total_cost(options, choice), total_spending(options, choice, "weight_bytes")) == best
    assert allocate(options, limits) == choice, "deterministic"


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.integers(1, 12))
def test_a_larger_budget_never_costs_more(seed: int, low: float, high: float, packs: int) -> None:
    options = instance(random.Random(seed), packs)
    found = []
    for share in sorted((low, high)):
        limits = {}
        for name in ("weight_bits", "activation_bits"):
            least, most = ends(options, name)
            limits[name] = least + int(share * (most - least))
        found.append(total_cost(options, allocate(options, limits)))
    assert found[1] <= found[0] + tolerance(options)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 10))
def test_the_tightest_budgets_that_can_be_kept_are_kept(seed: int, packs: int) -> None:
    options = instance(random.Random(seed), packs)
    least = {name: ends(options, name)[0] for name in RESOURCES}
    choice = allocate(options, least)
    assert {name: total_spending(options, choice, name) for name in RESOURCES} == least
    with pytest.raises(InfeasibleError) as error:
        allocate(options, {**least, "weight_bits": least["weight_bits"] - 1, "bit_operations": 0})
    assert error.value.smallest == {name: least[name] for name in ("weight_bits", "bit_operations")}


def test_limits_that_only_together_are_too_tight() -> None:
    """Each can be kept by itself; beside the other one, 7 of the first and 6 of the second are needed."""
    options = [Options((0.0, 1.0), ({"a": 1, "b": 6}, {"a": 7, "b": 2}))]
    with pytest.raises(InfeasibleError) as error:
        allocate(options, {"a": 3, "b": 3}, prefer="a")
    assert error.value.smallest == {"a": 7, "b": 6}


def test_no_cost_differs() -> None:
    spending = tuple({"weight_bytes": bytes_} for bytes_ in (5, 3, 4))
    assert allocate([Options((2.0, 2.0, 2.0), spending)] * 3, {}) == [1, 1, 1]
    assert allocate([Options((0.0,), ({"weight_bytes": 0},))], {"weight_bytes": 0}) == [0]


def test_costs_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="finite"):
        allocate([Options((1.0, float("nan")), ({"weight_bytes": 1}, {"weight_bytes": 2}))], {})


@pytest.mark.parametrize("seed", range(10))
def test_a_solver_that_breaks_a_limit_is_corrected(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits a bit too high for HiGHS, as its tolerance may make them, the optimum is still exact."""
    from pack_ptq import allocation

    real = allocation._row
    monkeypatch.setattr(allocation, "_row", lambda column, room: real(column, room + 0.2 * column.max()))
    draw = random.Random(seed)
    options = instance(draw, 3)
    limits = {"weight_bits": draw.randint(*ends(options, "weight_bits"))}
    choice = allocate(options, limits)
    assert total_spending(options, choice, "weight_bits") <= limits["weight_bits"]
    best = min(total_cost(options, other) for other in keeping(options, limits))
    assert total_cost(options, choice) == pytest.approx(best, rel=0, abs=tolerance(options))


@pytest.mark.parametrize("seed", range(8))
def test_pareto_front(seed: int) -> None:
    draw = random.Random(seed)
    options = instance(draw, 4)
    least, most = ends(options, "activation_bits")
    limits = {"activation_bits": draw.randint(least, most)}
    through = total_spending(options, allocate(options, limits), "weight_bytes")
    front = pareto_front(options, limits, also=[through])
    points = [(total_spending(options, c, "weight_bytes"), total_cost(options, c)) for c in front]
    assert 1 <= len(points) <= MOST_POINTS
    assert points[0][0] == ends(options, "weight_bytes")[0], "from the least bytes"
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))
    everything = [
        (total_spending(options, c, "weight_bytes"), total_cost(options, c)) for c in keeping(options, limits)
    ]
    for spent, cost in points:
        assert not any(s <= spent and c < cost - tolerance(options) for s, c in everything), "not dominated"
    assert points[-1][1] == pytest.approx(min(cost for _, cost in everything), abs=tolerance(options))


def test_front_of_a_single_choice() -> None:
    only = Options((1.0,), ({"weight_bytes": 7},))
    assert pareto_front([only, only], {}, also=[14]) == [[0, 0]]


@given(st.integers(0, 1000))
@settings(max_examples=5)
def test_many_packs_take_little_time(seed: int) -> None:
    options = instance(random.Random(seed), 40)
    limits = {name: sum(ends(options, name)) // 2 for name in RESOURCES}
    assert len(allocate(options, limits)) == 40
