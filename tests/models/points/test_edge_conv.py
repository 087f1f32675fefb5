import torch

from pack_ptq.models.points.edge_conv import EdgeConv, edge_features


def test_an_edge_is_a_difference_and_a_point():
    x, index = torch.randn(2, 6, 4), torch.randint(0, 6, (2, 6, 3))
    edges = edge_features(x, index)
    assert edges.shape == (2, 8, 6, 3)
    assert torch.equal(edges[1, :, 4, 2], torch.cat([x[1, index[1, 4, 2]] - x[1, 4], x[1, 4]]))


def test_maximum_over_the_edges_to_the_nearest():
    layer, x = EdgeConv(4, (5, 6), neighbours=3).eval(), torch.randn(2, 6, 4)
    found = layer(x)
    nearest = (x[1] - x[1, 4]).norm(dim=1).argsort()[:3]
    edges = torch.cat([x[1, nearest] - x[1, 4], x[1, 4].expand(3, 4)], 1)
    torch.testing.assert_close(found[1, 4], layer.mlp(edges.T[None, :, None]).amax((0, 2, 3)))
