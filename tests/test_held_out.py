"""Which samples only judge: as many as the recipe says, drawn alike by whoever asks, and never all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq import Recipe
from pack_ptq.held_out import held_out_rows
from pack_ptq.types import TuningSpec


def recipe(share: float = 0.125, steps: int = 1) -> Recipe:
    return Recipe(tuning=TuningSpec(steps=steps, held_out=share))


@given(st.integers(1, 300), st.floats(0.01, 0.5), st.integers(0, 3))
def test_they_are_different_places_in_order_and_leave_some(samples: int, share: float, seed: int) -> None:
    rows = held_out_rows(recipe(share), samples, seed).tolist()
    assert rows == sorted(set(rows))
    assert all(0 <= row < samples for row in rows)
    assert len(rows) == min(max(1, int(samples * share)), samples - 1)
    assert held_out_rows(recipe(share), samples, seed).tolist() == rows


def test_without_a_last_pass_there_are_none() -> None:
    assert held_out_rows(recipe(steps=0), 64, 0).tolist() == []


@pytest.mark.parametrize("classes", [8, 10, 40])
def test_samples_in_the_order_of_their_classes_leave_some_of_each(classes: int) -> None:
    """Whether class after class, or all classes over and over."""
    rows = held_out_rows(recipe(), 40 * classes, 0)
    for labels in (rows // 40, rows % classes):
        assert len(labels.unique()) > 0.9 * classes
        assert labels.bincount().max() < 20


def test_seeds_draw_others() -> None:
    assert held_out_rows(recipe(), 64, 0).tolist() != held_out_rows(recipe(), 64, 1).tolist()
