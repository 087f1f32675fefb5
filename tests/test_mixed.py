"""Budgets and mixed bits against exhaustive search over plans, counted layer by layer."""

import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pack_ptq import BitBudget, MixedUnit, QuantizerSpec, Recipe, UserError, mix_bits, plan_bits, prepare
from pack_ptq.bits import CANDIDATES, LayerSize, average_activation_bits, average_weight_bits, spending
from pack_ptq.graph.chain import Chain
from pack_ptq.report import bit_summary, size_summary
from pack_ptq.sensitivity import layer_sizes
from pack_ptq.types import BITS, BitPlan, BlockScores, MixedPrecision, PackSensitivity, ParetoPoint, Plan, Unit

SIZES = {
    "stem": LayerSize(216, 108, 7776),
    "a.1": LayerSize(577, 288, 20772),
    "a.2": LayerSize(577, 288, 20772),
    "b.1": LayerSize(3001, 144, 30010),
    "c.1": LayerSize(901, 650, 65000),
    "head": LayerSize(40, 8, 40),
}
PACKS = {
    "a": PackSensitivity("a", {2: 0.5, 3: 0.09, 4: 0.03}, {2: 0.7, 3: 0.2, 4: 0.05}),
    "b": PackSensitivity("b", {2: 0.03, 3: 0.02, 4: 0.004}, {2: 0.4, 3: 0.1, 4: 0.03}),
    "c": PackSensitivity("c", {2: 0.8, 3: 0.3, 4: 0.01}, {2: 0.06, 3: 0.05, 4: 0.02}),
}
UNITS = [
    MixedUnit(("stem",)),
    MixedUnit(("a.1", "a.2"), PACKS["a"]),
    MixedUnit(("b.1",), PACKS["b"]),
    MixedUnit(("c.1",), PACKS["c"]),
    MixedUnit(("head",)),
]
LAYERS = [unit.layers for unit in UNITS]
ELEMENTS = {path: size.weights for path, size in SIZES.items()}
INPUTS = {path: size.inputs for path, size in SIZES.items()}


def recipe(weight: int = 3, activation: int = 3, **settings: Any) -> Recipe:
    return Recipe(QuantizerSpec(weight), QuantizerSpec(activation, per_channel=False), **settings)


def all_plans(which: Recipe) -> Iterator[tuple[float, BitPlan]]:
    """Give every plan with its predicted KL."""
    uniform = (which.weight.bits, which.activation.bits)
    for bits in product(product((2, 3, 4), repeat=2), repeat=3):
        cost = sum(pack.weight[w] + pack.activation[a] for pack, (w, a) in zip(PACKS.values(), bits, strict=True))
        yield cost, plan_bits(LAYERS, [uniform, *bits, uniform], which)


def averages(plan: BitPlan) -> tuple[float, float]:
    return average_weight_bits(plan.weight, ELEMENTS), average_activation_bits(plan.activation, INPUTS)


@pytest.mark.parametrize("protocol", ["first_last_8", "all", "boundary_high"])
def test_iso_is_the_best_plan_of_the_same_size(protocol: Any) -> None:
    which = recipe(protocol=protocol)
    bits, mixed = mix_bits(UNITS, SIZES, which)
    plan = plan_bits(LAYERS, bits, which)
    uniform = averages(plan_bits(LAYERS, [(3, 3)] * 5, which))
    assert (bits[0], bits[-1]) == ((3, 3), (3, 3))
    assert averages(plan) <= uniform
    assert averages(plan)[1] <= uniform[1]
    within = [c for c, p in all_plans(which) if averages(p)[0] <= uniform[0] and averages(p)[1] <= uniform[1]]
    assert mixed.predicted_kl == pytest.approx(min(within))
    assert mixed.predicted_kl < sum(pack.weight[3] + pack.activation[3] for pack in PACKS.values())
    assert mixed.packs == dict(zip("abc", bits[1:-1], strict=True))
    assert mixed.limits == pytest.approx({"weight_average": uniform[0], "activation_average": uniform[1]})
    assert (mixed.budget, mixed.sensitivity) == ("iso", tuple(PACKS.values()))


def test_paper_spends_half_way_between_the_middle_and_the_highest() -> None:
    which = recipe()
    _, mixed = mix_bits(UNITS, SIZES, which, "paper")
    inner = [path for layers in LAYERS[1:-1] for path in layers]
    ends = ELEMENTS["stem"] + ELEMENTS["head"]
    assert mixed.limits["weight_average"] == pytest.approx(
        (8 * ends + 3.5 * sum(ELEMENTS[p] for p in inner)) / sum(ELEMENTS.values()), abs=1e-4
    )
    ends = INPUTS["stem"] + INPUTS["head"]
    assert mixed.limits["activation_average"] == pytest.approx(
        (8 * ends + 3.5 * sum(INPUTS[p] for p in inner)) / sum(INPUTS.values()), abs=1e-4
    )


def test_explicit_limits_replace_those_of_the_budget_on_what_they_name() -> None:
    which = recipe()
    iso = mix_bits(UNITS, SIZES, which)[1].limits
    bytes_ = spending(plan_bits(LAYERS, [(3, 3)] * 5, which), SIZES)["weight_bytes"]
    for explicit, expected in [
        (BitBudget(weight_average=3.8), {"weight_average": 3.8, "activation_average": iso["activation_average"]}),
        (BitBudget(activation_average=4.5), {"weight_average": iso["weight_average"], "activation_average": 4.5}),
        (BitBudget(weight_bytes=bytes_), {"activation_average": iso["activation_average"], "weight_bytes": bytes_}),
        (BitBudget(bit_operations=2_000_000), {**iso, "bit_operations": 2_000_000}),
    ]:
        bits, mixed = mix_bits(UNITS, SIZES, which, "iso", explicit)
        assert mixed.limits == pytest.approx(expected, abs=1e-3)
        spent = spending(plan_bits(LAYERS, bits, which), SIZES)
        assert spent["weight_bytes"] <= mixed.limits.get("weight_bytes", 10**9)
        assert spent["bit_operations"] <= mixed.limits.get("bit_operations", 10**9)


def test_columns_of_split_channels_count_by_the_bits_of_the_input() -> None:
    size = LayerSize(800, 40, 1600, {4: Fraction(5, 4), 3: Fraction(3, 2)})
    plan = BitPlan({"a": 2}, {"a": 4})
    assert spending(plan, {"a": size}) == {
        "weight_bits": 2 * 1000,
        "activation_bits": 4 * 50,
        "weight_bytes": 250,
        "bit_operations": 2000 * 2 * 4,
    }
    assert size.at(3) == LayerSize(1200, 60, 2400, size.expansion)
    assert size.at(8) == size


def test_bit_operations_alone() -> None:
    which, most = recipe(), 1_700_000
    bits, mixed = mix_bits(UNITS, SIZES, which, "custom", BitBudget(bit_operations=most))
    assert mixed.limits == {"bit_operations": most}

    def operations(plan: BitPlan) -> int:
        return sum(SIZES[path].macs * plan.weight[path] * (plan.activation[path] or 32) for path in SIZES)

    assert operations(plan_bits(LAYERS, bits, which)) <= most
    assert mixed.predicted_kl == pytest.approx(min(c for c, p in all_plans(which) if operations(p) <= most))


@given(st.integers(-(10**6), 10**6))
def test_an_average_is_taken_as_it_is_written(weights: int) -> None:
    weights = 10 * (abs(weights) + 1)
    limit = BitBudget(weight_average=3.2).limits({"a": LayerSize(weights, 1, 1)})["weight_bits"]
    assert limit == 32 * weights // 10


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        (BitBudget(weight_average=1.5), r"bits\.init_args\.weight_average is 1\.5; allowed: 2\.2892 or more"),
        (BitBudget(weight_bytes=9), r"bits\.init_args\.weight_bytes is 9; allowed: 1523 or more"),
        (
            BitBudget(activation_average=2.0, bit_operations=7),
            r"activation_average is 2\.0; allowed: 2\.4684 or more.*bits\.init_args\.bit_operations is 7; allowed: \d+",
        ),
    ],
)
def test_impossible_budgets_are_refused_with_what_can_be_reached(explicit: BitBudget, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix_bits(UNITS, SIZES, recipe(), "iso", explicit)


def test_what_the_refusal_names_can_be_reached() -> None:
    with pytest.raises(UserError) as error:
        mix_bits(UNITS, SIZES, recipe(), "iso", BitBudget(weight_average=1))
    least = float(str(error.value).split("allowed: ")[1].split()[0])
    bits, _ = mix_bits(UNITS, SIZES, recipe(), "iso", BitBudget(weight_average=least))
    assert [weight for weight, _ in bits] == [3, 2, 2, 2, 3]


def test_iso_with_wider_candidates_only_is_refused() -> None:
    units = [MixedUnit(("a.1", "a.2"), PackSensitivity("a", {4: 0.1, 6: 0.0}, {3: 0.1}))]
    sizes = {path: SIZES[path] for path in ("a.1", "a.2")}
    with pytest.raises(UserError, match=r"weight_average is 3\.0; allowed: 4\.0 or more"):
        mix_bits(units, sizes, recipe(protocol="all"), "iso")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_must_be_positive_numbers(value: float) -> None:
    with pytest.raises(UserError, match=r"key\.weight_average is .*; allowed: a number above 0"):
        BitBudget(weight_average=value).check("key")


def test_pareto_front_holds_the_choice_of_the_run() -> None:
    bits, mixed = mix_bits(UNITS, SIZES, recipe())
    spent = spending(plan_bits(LAYERS, bits, recipe()), SIZES)
    assert (spent["weight_bytes"], mixed.predicted_kl) in [
        (point.weight_bytes, pytest.approx(point.predicted_kl)) for point in mixed.pareto
    ]
    for a, b in zip(mixed.pareto, mixed.pareto[1:], strict=False):
        assert a.weight_bytes < b.weight_bytes
        assert a.predicted_kl > b.predicted_kl
    assert mixed.pareto[0].weight_average == pytest.approx((8 * 256 + 2 * 5056) / 5312)


def test_every_width_has_candidates_around_it() -> None:
    for bits in BITS:
        assert bits in CANDIDATES[bits]
        assert set(CANDIDATES[bits]) <= set(BITS)
    assert (CANDIDATES[3], CANDIDATES[4], CANDIDATES[6]) == ((2, 3, 4), (3, 4, 6), (4, 6, 8)), "the paper's"


def test_spending_is_what_the_report_counts(small_chain: Chain, small_plan: BitPlan) -> None:
    sizes = layer_sizes(small_chain)
    spent = spending(small_plan, sizes)
    found = bit_summary(small_chain, [], small_plan)
    assert spent["weight_bits"] / sum(s.weights for s in sizes.values()) == found["weight_average"]
    assert spent["activation_bits"] / sum(s.inputs for s in sizes.values()) == found["activation_average"]
    wider = BitPlan(small_plan.weight | {"stem": 3, "head": 5}, small_plan.activation)
    grown = spending(wider, sizes)["weight_bytes"] - spent["weight_bytes"]
    sizes_in_bytes = [size_summary(small_chain, plan)["quantized"] for plan in (small_plan, wider)]
    assert grown == sizes_in_bytes[1] - sizes_in_bytes[0]


class Layers(nn.Module):
    """One convolution of each kind; `twice` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.up(self.grouped(x).relu()).relu()).relu())
        return self.head(x.mean((2, 3)))


def test_multiplications_by_hand() -> None:
    chain = prepare(Layers(), torch.randn(2, 4, 8, 8)).chain
    assert {path: size.macs for path, size in layer_sizes(chain).items()} == {
        "grouped": 6 * 4 * 4 * (2 * 9),
        "up": 6 * 4 * 4 * (2 * 4),  # 2 of the 4 output channels in each group
        "twice": 2 * 4 * 8 * 8 * 4,
        "head": 3 * 4,
    }


def test_plans_with_and_without_mixed_precision_go_through_json() -> None:
    mixed = MixedPrecision(
        {"a": (2, 4)}, 0.1, "iso", {"weight_average": 3.1}, (PACKS["a"],), (ParetoPoint(10, 3.0, 0.2),)
    )
    scores = BlockScores(("a",), (1.0,), (0.1,), (2.0,), 7)
    units = (Unit("pack", ("a",), 0, 1),)
    plan = Plan(scores, units, BitPlan({"x": 2}, {"x": None}), (3, 8, 8), {"scoring": 1.0}, mixed)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    old = json.loads(json.dumps(plan.to_json()))
    del old["mixed"]
    assert Plan.from_json(old).mixed is None
