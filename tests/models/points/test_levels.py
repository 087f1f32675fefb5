import torch
from torch import nn

from pack_ptq.models.points.levels import Ascend, Descend, bundle


class Half(nn.Module):
    def forward(self, x):
        return x[:, ::2]


class Add(nn.Module):
    def forward(self, fine, coarse):
        return fine + coarse.mean(1, keepdim=True)


def test_bundling_changes_nothing():
    levels = [torch.randn(2, 8, 3), torch.randn(2, 4), torch.randn(2, 2, 3, 4)]
    assert all(torch.equal(*pair) for pair in zip(bundle(levels), levels, strict=True))


def test_down_and_up_again():
    x = torch.randn(2, 8, 3)
    fine, coarse = Descend(Half())([x])
    assert torch.equal(fine, x)
    assert torch.equal(coarse, x[:, ::2])
    (merged,) = Ascend(Add())([fine, coarse])
    assert torch.equal(merged, x + x[:, ::2].mean(1, keepdim=True))
