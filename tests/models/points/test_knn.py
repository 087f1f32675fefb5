import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_ptq.models.points.knn import knn


@settings(max_examples=50)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 8), st.integers(1, 12), st.integers(1, 14))
def test_the_nearest_of_all(seed, batch, queries, count, neighbours):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randint(-2, 3, (batch, queries, 3), generator=generator).float()
    points = torch.randint(-2, 3, (batch, count, 3), generator=generator).float()
    distance = (centres[:, :, None] - points[:, None]).square().sum(3)
    found = knn(centres, points, neighbours)
    assert torch.equal(distance.gather(2, found), distance.sort(2).values[..., :neighbours])
    assert all(len(set(row)) == len(row) for row in found.flatten(0, 1).tolist())


def test_features_of_many_channels():
    x = torch.randn(2, 60, 64)
    expected = (x[:, :, None] - x[:, None]).square().sum(3).argsort(2)[..., :7]
    assert torch.equal(knn(x, x, 7), expected)


def test_close_points_far_from_the_origin_keep_their_order():
    points = torch.tensor([100.0, 100.001, 100.003, 100.007])[:, None].repeat(20, 3)[None, :40]
    distance = (points[:, :, None] - points[:, None]).square().sum(3)
    nearest = distance.gather(2, knn(points, points, 25))
    assert torch.equal(nearest, distance.sort(2).values[..., :25])
