import torch

from pack_ptq.models.points.gathering import gather_neighbours, gather_points, group_points


def test_points_by_index():
    x, index = torch.randn(2, 9, 5), torch.randint(0, 9, (2, 4, 3))
    picked = gather_points(x, index)
    assert picked.shape == (2, 4, 3, 5)
    assert all(torch.equal(picked[b, i, j], x[b, index[b, i, j]]) for b in range(2) for i in range(4) for j in range(3))
    assert torch.equal(gather_points(x, index[..., 0]), picked[:, :, 0])


def test_groups_have_relative_coordinates_and_plain_features():
    x, centres, index = torch.randn(2, 9, 5), torch.randn(2, 4, 3), torch.randint(0, 9, (2, 4, 6))
    grouped = group_points(x, centres, index)
    assert grouped.shape == (2, 5, 4, 6)
    neighbour = x[1, index[1, 2, 3]]
    assert torch.equal(grouped[1, :3, 2, 3], neighbour[:3] - centres[1, 2])
    assert torch.equal(grouped[1, 3:, 2, 3], neighbour[3:])


def test_features_of_neighbours():
    features, index = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 4, 6))
    gathered = gather_neighbours(features, index)
    assert gathered.shape == (2, 5, 4, 6)
    assert torch.equal(gathered[1, :, 2, 3], features[1, :, index[1, 2, 3]])


def test_gradients_reach_every_copy():
    x = torch.zeros(1, 3, 2, requires_grad=True)
    gather_points(x, torch.tensor([[[0, 0], [0, 2]]])).sum().backward()
    assert x.grad.tolist() == [[[3, 3], [0, 0], [1, 1]]]
