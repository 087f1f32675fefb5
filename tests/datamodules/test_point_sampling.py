"""Choices of points against their definitions."""

import numpy as np
import pytest

from pack_ptq.datamodules.point_sampling import choose_points

POINTS = np.random.RandomState(0).standard_normal((50, 3))


def chosen(count: int, how: str, seed: int = 0, points: np.ndarray = POINTS) -> list[int]:
    return choose_points(points, count, how, np.random.RandomState(seed)).tolist()  # type: ignore[arg-type]


def test_first() -> None:
    assert chosen(20, "first") == list(range(20))
    assert chosen(50, "first") == list(range(50))


def test_random_is_a_seeded_draw_without_replacement() -> None:
    first = chosen(20, "random")
    assert first == chosen(20, "random") != chosen(20, "random", seed=1)
    assert len(set(first)) == 20
    assert first == chosen(30, "random")[:20]


def test_farthest_takes_the_farthest_every_time() -> None:
    rows = chosen(20, "farthest")
    start = int(np.random.RandomState(0).randint(50))
    expected = [start]
    for _ in range(19):
        gaps = np.linalg.norm(POINTS[:, None] - POINTS[expected], axis=2).min(1)
        expected.append(int(gaps.argmax()))
    assert rows == expected


def test_farthest_among_equal_points() -> None:
    assert len(chosen(20, "farthest", points=np.ones((50, 3)))) == 20


@pytest.mark.parametrize("how", ["first", "random", "farthest"])
@pytest.mark.parametrize("count", [51, 100, 120, 501])
def test_small_clouds_give_all_points_and_each_as_often_as_any(how: str, count: int) -> None:
    rows = chosen(count, how)
    assert len(rows) == count
    times = np.bincount(rows, minlength=50)
    assert times.max() - times.min() <= 1
    assert rows == chosen(count, how) != chosen(count, how, seed=1)


def test_one_point_is_repeated() -> None:
    assert chosen(5, "first", points=POINTS[:1]) == [0] * 5
