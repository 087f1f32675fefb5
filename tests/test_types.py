"""Records refuse what is out of range by the name of its key, and go through JSON."""

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq.errors import UserError
from pack_ptq.types import (
    BitPlan,
    BlockScores,
    Hardware,
    LowRankSpec,
    Plan,
    Preprocessing,
    QuantizerSpec,
    Recipe,
    ReconstructionSpec,
    TuningResult,
    TuningSpec,
    Unit,
    UnitResult,
)

ACTIVATION = QuantizerSpec(per_channel=False)


@given(st.integers(-100, 100))
def test_bits_from_2_to_8(bits: int) -> None:
    spec = QuantizerSpec(bits=bits, per_channel=False)
    if 2 <= bits <= 8:
        assert Recipe(weight=spec, activation=spec).weight.bits == bits
        return
    with pytest.raises(UserError, match=rf"recipe\.weight\.bits is {bits}; allowed: 2 to 8"):
        Recipe(weight=spec)
    with pytest.raises(UserError, match=rf"recipe\.activation\.bits is {bits}; allowed: 2 to 8"):
        Recipe(activation=spec)


@pytest.mark.parametrize("share", [50, 0, 100.01, -1, float("nan")])
def test_percentile(share: float) -> None:
    with pytest.raises(UserError, match=r"recipe\.weight\.percentile is .*; allowed: above 50 and at most 100"):
        Recipe(weight=QuantizerSpec(percentile=share))
    assert Recipe(weight=QuantizerSpec(percentile=100)).weight.percentile == 100


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [-1, -5]),
        ("batch_size", [0, -1]),
        ("evaluations", [0]),
        ("cache_bytes", [0, -1]),
        ("input_drop", [-0.1, 1.1, float("nan")]),
        ("inner_drop", [-0.1, 1.1, float("nan")]),
        ("penalty_start", [-0.1, 1, 2, float("nan")]),
        ("rounding_lr", [-1e-3]),
        ("activation_scale_lr", [-1e-3]),
        ("weight_scale_lr", [-1e-3]),
        ("penalty_weight", [-1]),
    ],
)
def test_reconstruction_settings(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"recipe\.reconstruction\.{name} is {value}; allowed: "):
            Recipe(reconstruction=ReconstructionSpec(**{name: value}))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1, float("nan")])
def test_curriculum(share: float) -> None:
    with pytest.raises(UserError, match=rf"reconstruction\.curriculum is {share}; allowed: above 0 and at most 1"):
        Recipe(reconstruction=ReconstructionSpec(curriculum=share))
    assert Recipe(reconstruction=ReconstructionSpec(curriculum=1.0)).reconstruction.curriculum == 1
    assert Recipe().reconstruction.curriculum is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ranks", [(), (0,), (10, -1), (10, 10)]),
        ("search_steps", [-1]),
        ("fit_steps", [-1]),
        ("learning_rate", [0, -1e-3, float("nan")]),
        ("alpha_lr", [0, float("nan")]),
        ("drop_path", [-0.1, 1, float("nan")]),
        ("held_out", [0, 0.51, float("nan")]),
        ("order", ["after"]),
    ],
)
def test_low_rank_settings(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"recipe\.reconstruction\.low_rank\.{name} is .*; allowed: "):
            Recipe(reconstruction=ReconstructionSpec(low_rank=LowRankSpec(**{name: value})))
    ends = LowRankSpec(ranks=(1,), search_steps=1, fit_steps=0, drop_path=0.0, held_out=0.5, order="joint")
    Recipe(reconstruction=ReconstructionSpec(low_rank=ends))
    assert Recipe().reconstruction.low_rank.search_steps == 0, "no compensation unless asked for"


@pytest.mark.parametrize(("name", "allowed"), [("loss", "mse, fisher"), ("granularity", "pack, layer")])
def test_choices_of_the_reconstruction(name: str, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"recipe\.reconstruction\.{name} is 'both'; allowed: {allowed}"):
        Recipe(reconstruction=ReconstructionSpec(**{name: "both"}))
    for choice in allowed.split(", "):
        Recipe(reconstruction=ReconstructionSpec(**{name: choice}))


def test_layers_have_no_fisher_loss() -> None:
    with pytest.raises(UserError, match=r"loss is 'fisher'; allowed: mse, or recipe\.reconstruction\.granularity pack"):
        Recipe(reconstruction=ReconstructionSpec(loss="fisher", granularity="layer"))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0, "batch_size": 1, "evaluations": 1, "cache_bytes": 1},
        {"input_drop": 0, "inner_drop": 1, "penalty_start": 0},
        {"rounding_lr": 0, "activation_scale_lr": 0, "weight_scale_lr": 0, "penalty_weight": 0},
    ],
)
def test_ends_of_the_ranges_are_allowed(settings: dict[str, Any]) -> None:
    Recipe(reconstruction=ReconstructionSpec(**settings))


def test_combinations_that_runtimes_cannot_hold_are_refused() -> None:
    with pytest.raises(UserError, match=r"recipe\.activation\.per_channel is True"):
        Recipe(activation=QuantizerSpec())
    with pytest.raises(UserError, match=r"recipe\.weight\.per_channel is False.*deploy"):
        Recipe(weight=QuantizerSpec(per_channel=False), profile="deploy")
    Recipe(weight=QuantizerSpec(per_channel=False))


def test_steps_come_from_the_budget_unless_given() -> None:
    assert [Recipe(budget=budget).steps for budget in ("fast", "default", "best")] == [60, 1000, 5000]
    assert Recipe(budget="best", reconstruction=ReconstructionSpec(steps=7)).steps == 7
    assert Recipe(budget="best", reconstruction=ReconstructionSpec(steps=0)).steps == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [-1]),
        ("batch_size", [0, -1]),
        ("views", [0, -1]),
        ("held_out", [0.0, -0.1, 0.51, float("nan")]),
        ("slow_share", [-0.1, 1.0, float("nan")]),
        ("evaluations", [0]),
        ("first_drop", [0.0, -0.3, float("nan")]),
        ("weight_scale_lr", [-1e-3, float("nan")]),
        ("activation_scale_lr", [-1e-3, float("nan")]),
        ("bias_lr", [-1e-3, float("nan")]),
        ("rate_power", [-1.0, float("nan")]),
        ("feature_weight", [-1.0, float("nan")]),
    ],
)
def test_tuning_settings(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"recipe\.tuning\.{name} is {value}; allowed: "):
            Recipe(tuning=TuningSpec(**{name: value}))


def test_tuning_needs_a_rate() -> None:
    rates = ("weight_scale_lr", "activation_scale_lr", "bias_lr")
    with pytest.raises(
        UserError, match=r"recipe\.tuning\.weight_scale_lr is 0.*activation_scale_lr or bias_lr above 0"
    ):
        Recipe(tuning=TuningSpec(**dict.fromkeys(rates, 0.0)))
    for name in rates:
        Recipe(tuning=TuningSpec(**(dict.fromkeys(rates, 0.0) | {name: 1e-3})))
    Recipe(tuning=TuningSpec(steps=0, **dict.fromkeys(rates, 0.0)))


def test_tuning_steps_come_from_the_budget_unless_given() -> None:
    assert [Recipe(budget=budget).tuning_steps for budget in ("fast", "default", "best")] == [100, 1000, 2000]
    assert Recipe(budget="best", tuning=TuningSpec(steps=0)).tuning_steps == 0
    assert Recipe(budget="best", tuning=TuningSpec(steps=7)).tuning_steps == 7


def test_hardware() -> None:
    assert Hardware().devices == 1
    with pytest.raises(UserError, match=r"hardware\.devices is 0; allowed: 1 or more"):
        Hardware(devices=0)


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().protocol = "all"  # type: ignore[misc]


PLAN = Plan(
    BlockScores(("a", "b"), (1.5, -2.0), (0.1, 0.2), (3.0, 4.0), 17),
    (Unit("stem", ("s",), 0, 1), Unit("pack", ("a", "b"), 1, 3)),
    BitPlan({"s": 8, "a.c": 3}, {"s": None, "a.c": 4}),
    (3, 8, 8),
    {"calibration": 0.5},
)


@pytest.mark.parametrize(
    "record",
    [
        PLAN,
        Preprocessing(image_size=32, mean=0.5, std=0.25),  # type: ignore[arg-type]
        QuantizerSpec(bits=2, observer="minmax"),
        Hardware("cpu", 2),
        UnitResult("u", "x", 3, 2.0, 1.0, True, 0.1),  # type: ignore[arg-type]
        UnitResult("u", "x", 3, 2.0, 1.0, True, 0.1, {"u.fc": 20}),  # type: ignore[arg-type]
        TuningResult(400, 0.26, 0.19, True, 7.5),
        TuningSpec(None, 16, 0.0),
    ],
    ids=lambda record: type(record).__name__,
)
def test_json_round_trip(record: Any) -> None:
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


def test_unit_names() -> None:
    assert [unit.name for unit in PLAN.units] == ["s", "a..b"]
