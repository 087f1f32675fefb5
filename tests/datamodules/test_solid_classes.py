"""The classes of solids: their number, and that every one has its parts."""

import numpy as np
import pytest

from pack_ptq.datamodules.solid_classes import SOLIDS


def test_enough_classes_and_most_have_parts() -> None:
    assert len(SOLIDS) == 20
    assert sum(parts > 1 for parts, _ in SOLIDS.values()) == 17


@pytest.mark.parametrize("name", SOLIDS)
def test_surfaces_have_areas_and_exactly_the_parts(name: str) -> None:
    parts, build = SOLIDS[name]
    for seed in range(20):
        surfaces = build(np.random.RandomState(seed))
        areas = np.array([surface.area for surface in surfaces])
        assert (areas > 0).all()
        of_part = np.array([areas[[s.part == part for s in surfaces]].sum() for part in range(parts)])
        assert {surface.part for surface in surfaces} == set(range(parts))
        # A part needs points: one in forty at least of the 1024 of a cloud.
        assert (of_part > areas.sum() / 150).all()
