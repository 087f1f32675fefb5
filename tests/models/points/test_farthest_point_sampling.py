import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_ptq.models.points.farthest_point_sampling import farthest_point_sampling


def one_by_one(points, samples, start):
    chosen = [start]
    while len(chosen) < min(samples, len(points)):
        nearest = [min(sum((p - points[c]) ** 2).item() for c in chosen) for p in points]
        chosen.append(nearest.index(max(nearest)))
    return chosen


@settings(max_examples=50)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 12), st.integers(1, 14), st.data())
def test_every_point_is_the_farthest_from_those_before(seed, batch, count, samples, data):
    points = torch.randint(-2, 3, (batch, count, 3), generator=torch.Generator().manual_seed(seed)).float()
    start = data.draw(st.integers(0, count - 1))
    expected = [one_by_one(sample, samples, start) for sample in points]
    assert farthest_point_sampling(points, samples, start).tolist() == expected


def test_starts_at_the_first_point():
    assert farthest_point_sampling(torch.randn(3, 9, 3), 4)[:, 0].tolist() == [0, 0, 0]


def test_no_more_than_there_are():
    points = torch.randn(2, 5, 3)
    assert farthest_point_sampling(points, 8).sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2
