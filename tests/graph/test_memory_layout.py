"""Convolutions lie channels last, unless the network's own calls do not bear it; outputs are the same."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pack_ptq import QuantizerSpec, Recipe, observe, plan_bits, prepare, set_ranges
from pack_ptq.graph.switch import switch

X = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Flat(nn.Module):
    """Two convolutions whose map of 6 x 6 goes into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.b(self.norm(self.a(x)).relu()).relu()))

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Viewed(Flat):
    def flat(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


class ViewedInTheMiddle(Flat):
    """The view mixes channels and rows, and gives a map again."""

    def flat(self, x: Tensor) -> Tensor:
        return x.view(len(x), 2, 72).mul(2).view(len(x), 4, 6, 6).flatten(1)


class Volumes(nn.Module):
    """Weights with five axes beside weights with four."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x[:, None]).relu()).relu().mean(2)
        return self.head(self.c(x).relu().mean((2, 3)))


@pytest.mark.parametrize(("kind", "last"), [(Flat, True), (Viewed, False), (ViewedInTheMiddle, False), (Volumes, True)])
def test_layout_and_outputs(kind: type[nn.Module], last: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = kind().eval()
    before = copy.deepcopy(network)
    chain = prepare(network, X).chain
    weights = [layer.weight for layer in chain.layers.values() if layer.weight.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) == last for w in weights)
    assert all(w.is_contiguous() != last for w in weights)
    for batch in (X, X[:1]):
        expected = before(batch)
        torch.testing.assert_close(chain.network(batch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chain.run(batch), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in network.state_dict().items())
    assert all(v.is_contiguous() for v in network.state_dict().values()), "the user's own network stays as it is"


@pytest.mark.parametrize("kind", [Flat, Viewed])
def test_quantized_too(kind: type[nn.Module]) -> None:
    """The layout changes the outputs of the quantized network by rounding at most."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = kind().eval()
    recipe = Recipe(QuantizerSpec(bits=8), QuantizerSpec(bits=8, per_channel=False), protocol="all")
    chain = prepare(network, X).chain
    observe(chain, [X])
    set_ranges(chain, plan_bits([list(chain.layers)], [(8, 8)], recipe), recipe)
    switch(chain.layers.values(), "nearest", activations=True)
    torch.testing.assert_close(chain.network(X), network(X), rtol=0.05, atol=0.05)
    for start in range(1, len(chain)):
        torch.testing.assert_close(chain.run(chain.run(X, 0, start), start), chain.network(X))
