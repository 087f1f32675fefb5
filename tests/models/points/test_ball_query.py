import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_ptq.models.points.ball_query import ball_query


def first_inside(centre, points, radius, neighbours):
    size = min(neighbours, len(points))
    inside = [i for i, p in enumerate(points) if sum((p - centre) ** 2).item() < radius**2][:size]
    return inside + [inside[0] if inside else 0] * (size - len(inside))


@settings(max_examples=50)
@given(
    st.integers(0, 999),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([0.5, 1.2, 2.1, 9]),
    st.integers(1, 14),
)
def test_the_first_points_inside_padded_with_the_very_first(seed, batch, queries, count, radius, neighbours):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randint(-2, 3, (batch, queries, 3), generator=generator).float()
    points = torch.randint(-2, 3, (batch, count, 3), generator=generator).float()
    expected = [[first_inside(c, p, radius, neighbours) for c in cs] for cs, p in zip(centres, points, strict=True)]
    assert ball_query(centres, points, radius, neighbours).tolist() == expected


@pytest.mark.parametrize(("radius", "expected"), [(1.0, [0, 0]), (1.01, [0, 1])])
def test_a_point_at_the_radius_is_outside(radius, expected):
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    assert ball_query(points[:, :1], points, radius, 2).tolist() == [[expected]]
