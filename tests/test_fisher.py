"""Weights of BRECQ's loss against gradients that are written out."""

import pytest
import torch
from torch import Tensor, nn

from pack_ptq import fisher
from pack_ptq.cache import MemoryBudget, Storage, fill
from pack_ptq.errors import UserError
from pack_ptq.fisher import fisher_weights, squared_gradient
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.prepare import prepare
from pack_ptq.graph.switch import quantized
from pack_ptq.types import Unit

PACK, LAST, HEAD = (
    Unit("pack", ("blocks.0", "blocks.1"), 1, 3),
    Unit("pack", ("blocks.2",), 3, 4),
    Unit("head", ("head",), 4, 5),
)


@torch.no_grad()
def inputs_of(chain: Chain, samples: Tensor, unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """Give a unit's input, its output when it alone is quantized, and the full-precision probabilities."""
    x = chain.run(samples, 0, unit.start)
    with quantized(chain.layers_of(unit.start, unit.stop).values(), "nearest"):
        output = chain.run(x, unit.start, unit.stop)
    return x, output, chain.network(samples).double().softmax(1)


def cached(x: Tensor) -> Storage:
    return fill(MemoryBudget(2**30), len(x), x.split(24), lambda rows: rows)


def test_gradient_is_the_jacobian_times_the_change_of_the_probabilities(small_chain: Chain, samples: Tensor) -> None:
    network = small_chain.network
    for unit, tail in (
        (PACK, lambda z: network.head(network.blocks[2](z).mean((2, 3)))),
        (LAST, lambda z: network.head(z.mean((2, 3)))),
    ):
        x, output, reference = inputs_of(small_chain, samples[:5], unit)
        found = squared_gradient(small_chain, unit, x)
        assert found.shape == output.shape
        for sample in range(5):
            z = output[sample : sample + 1]
            slopes = torch.autograd.functional.jacobian(tail, z)[0].flatten(1).double()  # type: ignore[index]
            change = tail(z).detach().double().softmax(1)[0] - reference[sample]
            expected = (change @ slopes).square().view_as(z[0])
            assert torch.allclose(found[sample].double(), expected, rtol=1e-3, atol=1e-3 * expected.max().item())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert all(layer.weight_quantizer.mode == "off" for layer in small_chain.layers.values())


def test_at_the_networks_output_it_is_the_change_of_the_probabilities(small_chain: Chain, samples: Tensor) -> None:
    x, output, reference = inputs_of(small_chain, samples, HEAD)
    expected = (output.double().softmax(1) - reference).square()
    assert torch.allclose(squared_gradient(small_chain, HEAD, x).double(), expected, rtol=1e-3, atol=1e-12)


def test_weights_are_the_squares_over_their_mean(small_chain: Chain, samples: Tensor) -> None:
    x, _, _ = inputs_of(small_chain, samples, PACK)
    inputs = cached(x)
    weights = fisher_weights(small_chain, PACK, inputs, 24)
    square = squared_gradient(small_chain, PACK, x)
    assert torch.allclose(weights.tensor, square / square.mean(), rtol=1e-3)
    assert weights.tensor.mean().item() == pytest.approx(1, rel=1e-5)
    assert weights.tensor.max() > 2, "some elements matter more than others"
    assert inputs.budget.used == inputs.tensor.nbytes + weights.tensor.nbytes


def test_mean_is_that_of_all_processes(small_chain: Chain, samples: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _ = inputs_of(small_chain, samples, PACK)
    first, second = (squared_gradient(small_chain, PACK, part).double() for part in (x[:40], x[40:]))
    other = torch.tensor([second.sum().item(), second.numel()], dtype=torch.float64)
    monkeypatch.setattr(fisher, "all_reduce", lambda sums: sums + other)
    weights = fisher_weights(small_chain, PACK, cached(x[:40]), 24).tensor.double()
    assert torch.allclose(weights, first / torch.cat([first, second]).mean(), rtol=1e-3)


def test_where_nothing_comes_of_the_unit_all_weights_are_one(small_chain: Chain, samples: Tensor) -> None:
    small_chain.layers["head"].weight.data.zero_()
    x, _, _ = inputs_of(small_chain, samples, PACK)
    assert (fisher_weights(small_chain, PACK, cached(x), 24).tensor == 1).all()


def test_gradients_that_are_no_numbers_are_refused(small_chain: Chain, samples: Tensor) -> None:
    x, _, _ = inputs_of(small_chain, samples, PACK)
    small_chain.layers["head"].weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"Fisher information at the output of blocks\.0\.\.blocks\.1 is nan"):
        fisher_weights(small_chain, PACK, cached(x), 24)


class NoGradient(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


def test_network_that_gives_no_gradient_is_refused(small_network: nn.Module, samples: Tensor) -> None:
    chain = prepare(NoGradient(small_network), samples[:4]).chain
    unit = Unit("pack", (chain.names[1],), 1, 2)
    with pytest.raises(UserError, match=r"loss is 'fisher', but the output gives no gradient to .*; allowed: mse"):
        squared_gradient(chain, unit, chain.run(samples, 0, 1))
