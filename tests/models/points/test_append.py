import torch
from torch import nn

from pack_ptq.models.points.append import Append


def test_reads_the_end_and_appends():
    x, layer = torch.randn(2, 5, 7), nn.Linear(3, 4)
    assert torch.equal(Append(3, layer)(x), torch.cat([x, layer(x[..., 4:])], 2))
    assert torch.equal(Append(3, layer, replace=True)(x), torch.cat([x[..., :4], layer(x[..., 4:])], 2))
