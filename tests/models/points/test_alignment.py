import torch
from torch import nn

from pack_ptq.models.points.alignment import Alignment


def test_identity_before_training():
    x = torch.randn(2, 6, 10)
    assert torch.equal(Alignment(6).eval()(x), x)


def test_one_matrix_of_the_object_for_all_its_points():
    alignment, x = Alignment(3).eval(), torch.randn(2, 3, 10)
    nn.init.normal_(alignment.matrix.weight)
    matrix = alignment.matrix(alignment.whole(alignment.points(x).amax(2))).reshape(2, 3, 3)
    expected = torch.stack([matrix[b] @ x[b] for b in range(2)])
    torch.testing.assert_close(alignment(x), expected)
    assert not torch.allclose(matrix[0], matrix[1])
