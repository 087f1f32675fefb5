import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_ptq.models.points.interpolation import interpolate


def by_hand(query, points, features):
    distance = [((p - query).double() ** 2).sum().item() for p in points]
    nearest = sorted(range(len(points)), key=distance.__getitem__)[:3]
    weights = [1 / (distance[i] + 1e-8) for i in nearest]
    return sum(w * features[i].double() for w, i in zip(weights, nearest, strict=True)) / sum(weights)


@settings(max_examples=50)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9))
def test_weights_by_inverse_squared_distance(seed, queries, count):
    torch.manual_seed(seed)
    at, points, features = torch.randn(2, queries, 3), torch.randn(2, count, 3), torch.randn(2, count, 4)
    found = interpolate(at, points, features)
    expected = torch.stack([torch.stack([by_hand(q, points[b], features[b]) for q in at[b]]) for b in range(2)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_point_keeps_its_own_features():
    points, features = torch.randn(2, 8, 3), torch.randn(2, 8, 4)
    torch.testing.assert_close(interpolate(points, points, features), features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("copies", [1, 5])
def test_points_at_one_place_are_averaged(copies):
    features = torch.randn(1, copies, 4)
    found = interpolate(torch.zeros(1, 2, 3), torch.zeros(1, copies, 3), features)
    assert found.isfinite().all()
    if copies == 1:
        torch.testing.assert_close(found, features.expand(1, 2, 4))
