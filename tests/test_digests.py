"""Digests of networks see what they should."""

import torch
from torch import nn

from pack_ptq.digests import network_digest


def test_network_digest_sees_every_value_and_name() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).bfloat16()

    digest = network_digest(network())
    assert digest == network_digest(network())
    moved = network()
    moved[1].num_batches_tracked += 1
    nudged = network()
    nudged[0].weight.data[0, 0] += 1
    renamed = nn.Sequential(network())
    assert len({digest, *map(network_digest, (moved, nudged, renamed))}) == 4
