"""What is fitted at once, and what one layer of it reads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import layer_part, layer_rows, unit_part
from pack_ptq.graph.prepare import prepare
from pack_ptq.types import Unit

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A stem, two convolutions that a subclass joins, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(F.relu(self.stem(x))).mean((2, 3)))

    def middle(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(x)))


class InPlace(Base):
    """What the layers read is overwritten after them."""

    def middle(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x += y
        z = self.b(x)
        x.mul_(0.5)
        return x + z


class Halves(Base):
    """Each layer reads one of the two tensors that a single call gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def middle(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return x + torch.cat([self.b(second), self.a(first)], 1)


class Windows(Base):
    """Four windows of a sample lie along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(x.flatten(0, 1).flatten(1)))).view_as(x)


class Twice(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x + self.a(F.relu(self.a(self.b(x))))


class ChannelsFirst(Base):
    """A layer whose first axis is no axis of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x.transpose(0, 1)).transpose(0, 1))


def chain_of(kind: type[Base]) -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare(kind().eval(), X).chain


@torch.no_grad()
def read_by(chain: Chain, path: str) -> Tensor:
    """Run the whole network and copy what the layer reads."""
    seen: list[Tensor] = []
    handle = chain.layers[path].register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    chain.network(X)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", [Base, InPlace, Halves, Windows])
def test_layers_read_the_same_behind_any_boundary_before_them(kind: type[Base]) -> None:
    chain = chain_of(kind)
    for link, element in enumerate(chain.elements):
        for path in element.layers:
            for start in range(link + 1):
                with torch.no_grad():
                    x = chain.run(X, 0, start)
                    value = chain.layer_input(x, start, path)
                assert torch.allclose(value, read_by(chain, path), atol=1e-6), (path, start)
    assert not any(layer._forward_pre_hooks for layer in chain.layers.values())


@pytest.mark.parametrize(("kind", "rows"), [(Base, 1), (Halves, 1), (Windows, 4)])
def test_rows_of_a_sample(kind: type[Base], rows: int) -> None:
    assert layer_rows(chain_of(kind), ["stem", "a", "b", "head"]) == {"stem": 1, "a": rows, "b": rows, "head": 1}


@pytest.mark.parametrize(("kind", "what"), [(Twice, "is called 2 times"), (ChannelsFirst, "reads no rows of samples")])
def test_layers_that_cannot_be_fitted_alone_are_refused_by_name(kind: type[Base], what: str) -> None:
    chain = chain_of(kind)
    with pytest.raises(UserError, match=f"recipe.reconstruction.granularity is 'layer', but a {what}; allowed: pack"):
        layer_rows(chain, list(chain.layers))


def test_parts_of_a_unit(small_chain: Chain, samples: Tensor) -> None:
    unit, stem = Unit("pack", ("blocks.0", "blocks.1"), 1, 3), Unit("stem", ("stem",), 0, 1)
    whole: Any = unit_part(small_chain, unit, "01 pack")
    assert (whole.label, list(whole.layers), whole.reads_image) == (
        "01 pack", [f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)], False
    )  # fmt: skip
    with torch.no_grad():
        x = small_chain.run(samples, 0, 1)
        assert torch.equal(whole.run(x), small_chain.run(x, 1, 3))
        conv = layer_part(small_chain, unit, "blocks.1.conv2", "01 pack")
        assert torch.equal(conv.run(x), small_chain.layers["blocks.1.conv2"](x))
    assert (conv.label, list(conv.layers)) == ("01 pack/blocks.1.conv2", ["blocks.1.conv2"])
    single = Unit("pack", ("blocks.2",), 3, 4)
    assert layer_part(small_chain, single, "blocks.2.conv1", "02 blocks.2").label == "02 blocks.2/conv1"
    assert layer_part(small_chain, stem, "stem", "00 stem").label == "00 stem"
    assert unit_part(small_chain, stem, "").reads_image
