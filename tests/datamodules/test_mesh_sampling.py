"""Points on surfaces: on the triangles, and as many as their areas ask."""

import numpy as np
import pytest

from pack_ptq.datamodules.mesh_sampling import sample_surface, triangulate

VERTICES = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 0, 1], [0, 2, 1]], np.float64)
FACES = np.array([[0, 1, 2], [3, 4, 5]])  # areas 0.5 and 3


def draw(count: int = 20000, vertices: np.ndarray = VERTICES, faces: np.ndarray = FACES, seed: int = 0) -> np.ndarray:
    return sample_surface(vertices, faces, count, np.random.RandomState(seed))


def test_polygons_become_fans_with_their_area() -> None:
    assert triangulate([[4, 5, 6], [0, 1, 2, 3], [7, 8], []]).tolist() == [[4, 5, 6], [0, 1, 2], [0, 2, 3]]
    assert triangulate([]).shape == (0, 3)


def test_points_lie_on_the_faces_in_proportion_to_their_areas() -> None:
    points = draw()
    upper = points[:, 2] > 0.5
    np.testing.assert_allclose(points[:, 2], upper, atol=1e-12)
    assert upper.mean() == pytest.approx(3 / 3.5, abs=0.01)
    lower = points[~upper]
    assert (lower[:, :2] >= 0).all()
    assert (lower[:, :2].sum(1) <= 1 + 1e-12).all()


def test_points_are_uniform_inside_a_triangle() -> None:
    points = draw(faces=FACES[:1])[:, :2]
    # Cut by the lines through the middles of its sides, a triangle falls into four equal ones.
    x, y = points.T
    quarters = [(x > 0.5).mean(), (y > 0.5).mean(), (x + y < 0.5).mean()]
    assert quarters == pytest.approx([0.25] * 3, abs=0.015)
    assert points.mean(0) == pytest.approx([1 / 3, 1 / 3], abs=0.01)


def test_the_seed_decides() -> None:
    assert np.array_equal(draw(50), draw(50))
    assert not np.array_equal(draw(50), draw(50, seed=1))


def test_broken_corners_and_flat_triangles_take_no_points() -> None:
    vertices = np.concatenate([VERTICES, [[np.nan, 0, 0], [np.inf, 0, 0]]])
    faces = np.concatenate([FACES, [[0, 1, 6], [0, 1, 7], [0, 1, 1]]])
    assert np.array_equal(draw(500, vertices, faces), draw(500))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e200])
def test_scale_does_not_matter(scale: float) -> None:
    np.testing.assert_allclose(draw(100, VERTICES * scale), draw(100) * scale, rtol=1e-9)


@pytest.mark.parametrize("faces", [[[0, 1, 6]], [[0, 1, -1]]])
def test_faces_without_their_vertex_are_refused(faces: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="a face names a vertex outside 0 to 5"):
        draw(faces=np.array(faces))


@pytest.mark.parametrize("faces", [[], [[0, 0, 1]]])
def test_surfaces_without_area_are_refused(faces: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="its surface has no area"):
        draw(faces=np.array(faces, np.int64).reshape(-1, 3))
