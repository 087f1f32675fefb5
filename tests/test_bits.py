"""Bits of every layer by protocol, and their averages."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq import QuantizerSpec, Recipe, plan_bits
from pack_ptq.bits import average_activation_bits, average_weight_bits, candidates

LAYERS = [["stem"], ["a.1", "a.2"], ["b.1"], ["head"]]
INNER = {"a.1": 3, "a.2": 3, "b.1": 5}
PACK_BITS = [(3, 4), (3, 4), (5, 6), (3, 4)]
INNER_INPUTS = {"a.1": 4, "a.2": 4, "b.1": 6}


def recipe(weight: int, activation: int, **settings: Any) -> Recipe:
    return Recipe(QuantizerSpec(bits=weight), QuantizerSpec(bits=activation, per_channel=False), **settings)


@pytest.mark.parametrize(
    ("protocol", "stem", "head"),
    [("all", (3, None), (3, 4)), ("first_last_8", (8, 8), (8, 8)), ("boundary_high", (4, None), (4, 6))],
)
def test_protocols(protocol: Any, stem: tuple, head: tuple) -> None:
    plan = plan_bits(LAYERS, PACK_BITS, recipe(3, 4, protocol=protocol))
    assert plan.weight == {"stem": stem[0], **INNER, "head": head[0]}
    assert plan.activation == {"stem": stem[1], **INNER_INPUTS, "head": head[1]}
    assert list(plan.weight) == ["stem", "a.1", "a.2", "b.1", "head"], "execution order"


@pytest.mark.parametrize(("bits", "high"), [(2, 4), (3, 4), (4, 6), (6, 8), (8, 8)])
def test_highest_candidates(bits: int, high: int) -> None:
    plan = plan_bits(LAYERS, [(bits, bits)] * 4, recipe(bits, bits, protocol="boundary_high"))
    assert (plan.weight["stem"], plan.weight["head"], plan.activation["head"]) == (high, high, high)


@pytest.mark.parametrize(
    ("protocol", "weight", "activation"), [("all", 3, None), ("first_last_8", 8, 8), ("boundary_high", 4, None)]
)
def test_network_of_one_layer(protocol: Any, weight: int, activation: int | None) -> None:
    plan = plan_bits([["only"]], [(3, 3)], recipe(3, 3, protocol=protocol))
    assert (plan.weight, plan.activation) == ({"only": weight}, {"only": activation})


def test_first_and_last_layer_inside_packs() -> None:
    plan = plan_bits([["a", "b"], ["c", "d"]], [(2, 2), (4, 4)], recipe(2, 2))
    assert plan.weight == {"a": 8, "b": 2, "c": 4, "d": 8}


def test_one_pair_of_bits_per_unit() -> None:
    with pytest.raises(ValueError, match="shorter"):
        plan_bits(LAYERS, PACK_BITS[:-1], Recipe())


@given(st.lists(st.tuples(st.integers(2, 8), st.integers(1, 500)), min_size=1, max_size=10))
def test_weight_average_is_the_mean_over_single_weights(layers: list[tuple[int, int]]) -> None:
    bits = {str(i): b for i, (b, _) in enumerate(layers)}
    elements = {str(i): n for i, (_, n) in enumerate(layers)}
    spelled_out = [b for b, n in layers for _ in range(n)]
    assert average_weight_bits(bits, elements) == pytest.approx(sum(spelled_out) / len(spelled_out))


def test_inputs_that_are_not_quantized_count_32() -> None:
    assert average_activation_bits({"a": None, "b": 4}, {"a": 1, "b": 3}) == (32 + 3 * 4) / 4


@pytest.mark.parametrize(
    ("bits", "packs", "layers"),
    [(2, (2, 3, 4), (2, 3, 4, 5)), (3, (2, 3, 4), (2, 3, 4, 5, 6)), (8, (6, 7, 8), (6, 7, 8))],
)
def test_candidates_by_hand(bits: int, packs: tuple[int, ...], layers: tuple[int, ...]) -> None:
    assert (candidates(bits), candidates(bits, "layer")) == (packs, layers)


def test_the_first_and_the_last_layer_are_found_around_groups_without_layers() -> None:
    plan = plan_bits([[], ["a"], ["b"], []], [(3, 3)] * 4, recipe(3, 3), [["p.x"], [], [], ["r.x"]])
    assert (plan.weight, plan.activation) == ({"a": 8, "b": 8}, {"p.x": 3, "a": 8, "b": 8, "r.x": 3})
