import torch

from pack_ptq.models.points.point_transformer_block import PointTransformerBlock
from pack_ptq.models.points.vector_attention import VectorAttention


def test_equation_3_of_the_paper():
    layer, points, x = VectorAttention(6, neighbours=4).eval(), torch.randn(2, 9, 3), torch.randn(2, 6, 9)
    found = layer(points, x)
    assert found.shape == x.shape
    nearest = (points[1] - points[1, 5]).norm(dim=1).argsort()[:4]
    delta = layer.theta((points[1, nearest] - points[1, 5]).T[None, :, None])
    query, key, value = layer.query(x)[1:, :, 5:6], layer.key(x)[1:, :, nearest], layer.value(x)[1:, :, nearest]
    weight = layer.gamma((query - key)[:, :, None] + delta).softmax(3)
    torch.testing.assert_close(found[1, :, 5], (weight * (value[:, :, None] + delta)).sum((0, 2, 3)))


def test_a_block_keeps_the_coordinates():
    x = torch.randn(2, 9, 3 + 8)
    found = PointTransformerBlock(8, neighbours=4).eval()(x)
    assert found.shape == x.shape
    assert torch.equal(found[..., :3], x[..., :3])
    assert not torch.equal(found[..., 3:], x[..., 3:])
