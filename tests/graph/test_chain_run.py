"""Running a part of a network: skipped layers never run, cached values stay as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.prepare import prepare
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.types import QuantizerSpec

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Steps(nn.Module):
    """A stem, four steps that a test fills in, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = conv(3), nn.ModuleList([conv() for _ in range(4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = self.step(x, layer)
        return self.head(x.mean((2, 3)))

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        return F.relu(layer(x)) + x


class InPlaceAdd(Steps):
    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        y = layer(x)
        y += x
        return y


class ResultUnused(Steps):
    """The network goes on with the argument, not with what the call gives."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        x.add_(layer(x))
        x.mul_(0.5)
        return x


class InPlaceRelu(Steps):
    """`relu` does not end in an underscore, but it overwrites the block's input."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        y = F.relu(x, inplace=True)
        return layer(y) - x


class ThroughView(Steps):
    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        x[:, :1].mul_(-2)
        return layer(x) + x


class SetItem(Steps):
    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        x[:, 0] = x[:, 1] * 3 + 1
        return layer(x) + x


class Constants(Steps):
    """Makes its own tensors, some in the shape of the batch."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        grid = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) / 10
        canvas = torch.zeros(x.shape[0], 1, *x.shape[2:])
        canvas += grid
        canvas[:, :, 0] = 2
        return F.relu(layer(x)) + x * canvas + torch.ones_like(x)


class ListsAndSizes(Steps):
    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        batch, channels, height, width = x.size()
        first, second = x.chunk(2, 1)
        y = torch.cat([second, first], 1).reshape(batch, channels, -1).transpose(1, 2)
        return layer(y.transpose(1, 2).reshape(-1, channels, height, width)) + x


class InContexts(Steps):
    """Leaving a context makes calls too, also while a run that has reached its end is unwound."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        with torch.autograd.profiler.record_function("step"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return F.relu(layer(x)) + x


NUM_LINKS = {ResultUnused: 3}
VARIANTS = [InContexts, Steps, InPlaceAdd, ResultUnused, InPlaceRelu, ThroughView, SetItem, Constants, ListsAndSizes]


@pytest.fixture(params=VARIANTS, ids=lambda kind: kind.__name__)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval()


@torch.no_grad()
def test_every_range_equals_the_whole_and_leaves_its_input(network: nn.Module) -> None:
    chain = prepare(network, X).chain
    assert len(chain) >= 3
    for x in (X[:1], X, torch.cat([X, X * 2, X[:3]])):
        before = x.clone()
        boundaries = {0: x} | chain.run_collecting(x, 0, len(chain), range(len(chain)))
        expected = network(x.clone())
        kept = {index: value.clone() for index, value in boundaries.items()}
        for start in range(len(chain) + 1):
            for stop in range(start, len(chain) + 1):
                value = chain.run(boundaries[start], start, stop)
                assert torch.allclose(value, kept[stop], atol=1e-5), (start, stop)
        assert torch.allclose(boundaries[len(chain)], expected, atol=1e-5)
        assert all(torch.equal(boundaries[index], kept[index]) for index in kept), "a run overwrote a cached value"
        assert torch.equal(x, before)


def test_number_of_links(network: nn.Module) -> None:
    chain = prepare(network, X).chain
    assert len(chain) == NUM_LINKS.get(type(network), 6)


def counted(chain: Chain) -> tuple[dict[str, int], list]:
    calls = dict.fromkeys(chain.layers, 0)

    def count(path: str) -> None:
        calls[path] += 1

    handles = [m.layer.register_forward_hook(lambda *_, p=p: count(p)) for p, m in chain.layers.items()]
    return calls, handles


def test_a_run_executes_its_own_layers_once_and_no_others() -> None:
    chain = prepare(Steps(), X).chain
    boundaries = {0: X} | chain.run_collecting(X, 0, len(chain), range(len(chain)))
    calls, _ = counted(chain)
    for start in range(len(chain)):
        for stop in range(start + 1, len(chain) + 1):
            calls.update(dict.fromkeys(calls, 0))
            chain.run(boundaries[start], start, stop)
            own = chain.layers_of(start, stop)
            assert calls == {path: int(path in own) for path in chain.layers}


def test_batch_of_another_size_than_traced_needs_no_new_trace() -> None:
    chain = prepare(Constants(), X[:1]).chain
    for size in (1, 2, 3, 7):
        x = torch.randn(size, 3, 8, 8)
        value = chain.run(chain.run(x, 0, 3), 3)
        assert torch.allclose(value, chain.network(x), atol=1e-5)


def test_gradients_reach_the_input_of_a_range_and_stop_there() -> None:
    chain = prepare(Steps(), X).chain
    value = chain.run(X, 0, 2).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(chain.run(value, 2, 4).sum(), value)
    direct = value.detach().requires_grad_()
    y = direct
    for layer in chain.network.layers[1:3]:
        y = F.relu(layer(y)) + y
    assert torch.allclose(gradient, torch.autograd.grad(y.sum(), direct)[0], atol=1e-5)


def test_another_way_than_traced_is_noticed() -> None:
    class Switched(Steps):
        extra = False

        def step(self, x: Tensor, layer: nn.Module) -> Tensor:
            return layer(torch.sigmoid(x) if self.extra else x.abs())

    chain = prepare(Switched(), X).chain
    chain.network.extra = True
    with pytest.raises(UserError, match="took another way"):
        chain.run(X)


def test_exceptions_of_the_network_get_out_and_leave_nothing_behind() -> None:
    chain = prepare(Steps(), X).chain
    with pytest.raises(RuntimeError):
        chain.run(torch.randn(2, 5, 8, 8), 1)
    assert torch.equal(chain.run(X), chain.network(X))


def test_switch_turns_all_quantizers_on_and_off() -> None:
    chain = prepare(Steps(), X).chain
    before = chain.run(X)
    for layer in chain.layers.values():
        layer.weight_quantizer.set_range(layer.weight, QuantizerSpec(2), symmetric=False)
        layer.input_quantizer.scale.data.fill_(0.3)
    assert torch.equal(chain.run(X), before)
    with quantized(chain.layers.values(), "nearest"):
        assert not torch.allclose(chain.run(X), before)
    assert torch.equal(chain.run(X), before)
    with pytest.raises(RuntimeError), quantized(chain.layers.values(), "nearest"):
        chain.run(torch.zeros(1, 7, 8, 8))
    assert torch.equal(chain.run(X), before), "off again, also after an exception"
    switch(chain.layers_of(1, 2).values(), "nearest", activations=False)
    assert [m.weight_quantizer.mode for m in chain.layers.values()] == ["off", "nearest"] + ["off"] * 4
