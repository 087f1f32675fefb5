"""Surfaces of solids: every point lies on them, evenly, and their areas are right."""

from collections.abc import Callable

import numpy as np
import pytest

from pack_ptq.datamodules.solid_surfaces import Surface, box, frustum, polygons, ring, sphere, torus

Test = Callable[[np.ndarray], np.ndarray]


def radius(points: np.ndarray) -> np.ndarray:
    return np.hypot(points[:, 0], points[:, 2])


def off_torus(points: np.ndarray) -> np.ndarray:
    return np.hypot(np.hypot(points[:, 0], points[:, 1]) - 1, points[:, 2]) - 0.3


def off_box(points: np.ndarray) -> np.ndarray:
    return np.abs(points / [0.5, 1, 1.5]).max(1) - 1


# Each surface with what is 0 on it, its area, and a condition with the share of the area that meets it.
CASES: dict[str, tuple[Surface, Test, float, Test, float]] = {
    "box": (box(1, 2, 3), off_box, 22, lambda p: np.abs(p[:, 0]) > 0.5 - 1e-9, 12 / 22),
    "cylinder": (frustum(0.5, 0.5, 2), lambda p: radius(p) - 0.5, 2 * np.pi, lambda p: p[:, 1] > 0.5, 0.25),
    "cone": (
        frustum(3, 0, 4), lambda p: radius(p) - 3 * (2 - p[:, 1]) / 4, 15 * np.pi, lambda p: p[:, 1] > 0, 0.25),
    "flaring": (
        frustum(0, 3, 4), lambda p: radius(p) - 3 * (p[:, 1] + 2) / 4, 15 * np.pi, lambda p: p[:, 1] < 0, 0.25),
    "ring": (ring(1, 2), lambda p: p[:, 1], 3 * np.pi, lambda p: radius(p) < np.sqrt(2.5), 0.5),
    "disk": (ring(0, 2), lambda p: p[:, 1], 4 * np.pi, lambda p: radius(p) < 1, 0.25),
    "sphere": (sphere(2), lambda p: np.linalg.norm(p, axis=1) - 2, 16 * np.pi, lambda p: p[:, 0] > 1, 0.25),
    "zone": (sphere(2, 0, 1), lambda p: np.linalg.norm(p, axis=1) - 2, 8 * np.pi, lambda p: p[:, 1] > 1, 0.5),
    # More than half of a ring's surface is on its outer side, by the radii of the centres of the two half circles.
    "torus": (torus(1, 0.3), off_torus, 4 * np.pi**2 * 0.3, lambda p: np.hypot(p[:, 0], p[:, 1]) > 1,
              0.5 + 0.3 / np.pi),
    "half torus": (torus(1, 0.3, 0.5), off_torus, 2 * np.pi**2 * 0.3, lambda p: p[:, 0] > -1e-9, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_points_are_on_the_surface_and_evenly_so(name: str) -> None:
    surface, off, area, condition, share = CASES[name]
    points = surface.draw(20000, np.random.RandomState(0))
    assert points.shape == (20000, 3)
    assert np.abs(off(points)).max() < 1e-9
    assert surface.area == pytest.approx(area)
    assert condition(points).mean() == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("name", CASES)
def test_no_points_are_no_matter(name: str) -> None:
    assert CASES[name][0].draw(0, np.random.RandomState(0)).shape == (0, 3)


def test_moved_surfaces() -> None:
    surface = polygons([(0, 0, 0), (1, 0, 0), (0, 2, 0)], [(0, 1, 2)], part=1)
    assert (surface.area, surface.part) == (1, 1)
    before, offset = surface.draw(9, np.random.RandomState(0)), np.array([1, 2, 3])
    moved = surface.at(*offset, part=4)
    np.testing.assert_allclose(moved.draw(9, np.random.RandomState(0)), before + offset)
    assert (moved.area, moved.part, surface.at(1).part) == (1, 4, 1)
