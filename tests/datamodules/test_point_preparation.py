"""From stored clouds to samples: every step by hand, and clouds as users have them."""

from typing import Any

import numpy as np
import pytest

from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.point_preparation import PointPreparation
from pack_ptq.errors import UserError

POINTS = np.random.RandomState(0).standard_normal((40, 3)) * [1, 2, 3] + [5, -1, 0]


def prepared(
    points: np.ndarray = POINTS, index: int = 0, cloud: dict[str, Any] | None = None, **settings: Any
) -> Cloud:
    settings = {"num_points": len(points)} | settings
    return PointPreparation(**settings).apply(Cloud("a.txt", points, **cloud or {}), index)


def points_of(*arguments: Any, **settings: Any) -> np.ndarray:
    return prepared(*arguments, **settings).points


def test_unit_sphere() -> None:
    points = points_of()
    assert points.dtype == np.float32
    assert points.mean(0) == pytest.approx([0, 0, 0], abs=1e-6)
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
    ratio = (POINTS - POINTS.mean(0)) / points
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_the_whole_cloud_counts_for_the_sphere_not_the_chosen_points() -> None:
    np.testing.assert_array_equal(points_of(num_points=10), points_of()[:10])


def test_none_leaves_points_as_they_are() -> None:
    np.testing.assert_array_equal(points_of(normalize="none"), POINTS.astype(np.float32))


def test_turns_keep_up_and_handedness() -> None:
    axes = np.eye(3)
    for stored, up in (("z", "y"), ("y", "z")):
        turned = points_of(axes, cloud={"up": stored}, up=up, normalize="none")
        assert turned["xyz".index(stored)].tolist() == axes["xyz".index(up)].tolist()
        assert np.linalg.det(turned) == pytest.approx(1)
        same = points_of(axes, cloud={"up": stored}, up=stored, normalize="none")
        assert same.tolist() == axes.tolist()


def test_columns_after_the_coordinates_are_left_out() -> None:
    normals = np.concatenate([POINTS, np.full((40, 3), np.nan)], 1)
    np.testing.assert_array_equal(points_of(normals), points_of())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_points_are_dropped_with_their_labels(value: float) -> None:
    points = np.insert(POINTS, [3, 17], value, axis=0)
    points[3, :2] = 0
    labels = np.insert(np.arange(40), [3, 17], -7)
    cloud = prepared(points, cloud={"part_labels": labels}, num_points=40)
    np.testing.assert_array_equal(cloud.points, points_of())
    assert cloud.part_labels is not None
    assert cloud.part_labels.tolist() == list(range(40))


@pytest.mark.parametrize("sampling", ["first", "random", "farthest"])
@pytest.mark.parametrize("count", [10, 100])
def test_labels_stay_with_their_points(sampling: str, count: int) -> None:
    cloud = prepared(cloud={"part_labels": np.arange(40)}, num_points=count, sampling=sampling)
    assert cloud.points.shape == (count, 3)
    np.testing.assert_array_equal(cloud.points, points_of()[cloud.part_labels])


def test_index_and_seed_decide_the_draw_alone() -> None:
    def draw(**settings: Any) -> bytes:
        return points_of(num_points=10, sampling="random", **settings).tobytes()

    assert draw() == draw()
    assert len({draw(), draw(index=1), draw(sampling_seed=1), draw(sampling_seed=2**32 - 1)}) == 4


def test_mesh_is_sampled_turned_and_normalized() -> None:
    # A square plate that lies in x and y, which is upright where z is up.
    corners, faces = np.array([[0, 0, 5], [2, 0, 5], [2, 2, 5], [0, 2, 5.0]]), np.array([[0, 1, 2], [0, 2, 3]])
    for sampling, most in (("first", 0.2), ("farthest", 0.9)):
        cloud = prepared(corners, cloud={"faces": faces, "up": "z"}, num_points=64, sampling=sampling)
        assert cloud.points.shape == (64, 3)
        assert cloud.faces is None
        assert np.abs(cloud.points[:, 1]).max() < 1e-6
        gaps = np.linalg.norm(cloud.points[:, None] - cloud.points, axis=2) + 9 * np.eye(64)
        # Farthest-point sampling keeps its points apart; as many uniform ones would be closer somewhere.
        assert (gaps.min() > 0.05) == (most > 0.5)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-6, 1e6, 1e30, 1e300])
def test_any_scale(scale: float) -> None:
    np.testing.assert_allclose(points_of(POINTS * scale), points_of(), atol=1e-6)


def test_far_away_in_single_precision() -> None:
    points = points_of((POINTS + 1e4).astype(np.float32))
    np.testing.assert_allclose(points, points_of(), atol=1e-3)


def test_integers_and_duplicates() -> None:
    points = points_of(np.array([[0, 0, 0], [2, 0, 0], [2, 0, 0], [0, 0, 0]]), sampling="farthest")
    assert set(points[:, 0].tolist()) == {-1, 1}


@pytest.mark.parametrize(
    ("points", "cloud", "message"),
    [
        (np.zeros((0, 3)), {}, "has 0 points, none finite; allowed: 1 or more"),
        (np.full((5, 3), np.nan), {}, "has 5 points, none finite; allowed: 1 or more"),
        (np.ones((5, 3)), {}, r"has all its points in one place; allowed: an extent, or data\.init_args\.normalize"),
        (np.full((5, 3), 1e6, np.float32), {}, "has all its points in one place"),
        (np.zeros((5, 2)), {}, r"has points of the shape \(5, 2\) in float64; allowed: numbers \(m, 3\)"),
        (np.zeros(5), {}, r"has points of the shape \(5,\)"),
        (np.array([["a", "b", "c"]]), {}, r"has points of the shape \(1, 3\) in <U1"),
        (POINTS, {"part_labels": np.arange(39)}, "has 39 labels for 40 points; allowed: one each"),
        (POINTS, {"faces": np.array([[0, 1, 40]])}, "cannot be sampled: a face names a vertex outside 0 to 39"),
        (POINTS, {"faces": np.array([[0, 1, 1]])}, "cannot be sampled: its surface has no area"),
    ],
)
def test_clouds_that_cannot_serve_are_refused_by_name(points: np.ndarray, cloud: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"^a\.txt {message}"):
        prepared(points, num_points=8, cloud=cloud)


def test_one_place_is_a_cloud_without_normalization_and_overflow_is_none() -> None:
    assert points_of(np.ones((5, 3)), normalize="none").tolist() == [[1, 1, 1]] * 5
    with pytest.raises(UserError, match=r"a\.txt has coordinates of 3\.4e38 or more; .*unit_sphere"):
        prepared(POINTS * 1e40, normalize="none")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("num_points", 0, "1 or more"),
        ("sampling_seed", -1, "0 to 4294967295"),
        ("sampling_seed", 2**32, "0 to 4294967295"),
        ("sampling", "last", "first, random, farthest"),
        ("normalize", "box", "unit_sphere, none"),
        ("up", "x", "y, z"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError) as refusal:
        PointPreparation(**{key: value})
    assert str(refusal.value) == f"data.init_args.{key} is {value!r}; allowed: {allowed}"
