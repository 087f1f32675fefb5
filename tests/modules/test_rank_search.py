"""The search for ranks: whose rows move what, and what it leaves as it was."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.graph.part import Part
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.random_batches import RandomBatches
from pack_ptq.modules.rank_search import InTurns, RankSearch, split_rows
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.low_rank import LowRankCandidates
from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.types import LowRankSpec, QuantizerSpec

SPEC = LowRankSpec(search_steps=10, drop_path=0.5)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def part_of(outputs: int = 7, inputs: int = 9) -> Part:
    """Give one linear layer with weights of 3 bits and inputs of 4."""
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    linear.weight.copy_(random(outputs, inputs, seed=1))
    layer = QuantizedLayer(linear, ActivationQuantizer())
    layer.weight_quantizer.set_range(layer.weight, QuantizerSpec(bits=3), symmetric=False)
    layer.input_quantizer.bits = 4
    layer.input_quantizer.scale.fill_(0.4)
    layer.input_quantizer.zero_point.fill_(8)
    return Part("00 a", {"a": layer}, {}, layer)


def search_of(part: Part, ranks: tuple[int, ...] = (2, 3), spec: LowRankSpec = SPEC) -> RankSearch:
    each = LowRankCandidates(part.layers["a"].weight, ranks, torch.Generator().manual_seed(2))
    with torch.no_grad():
        each.up += random(*each.up.shape, seed=3)
    return RankSearch(part, {"a": each}, spec, steps=10, seed=0)


def batch(seed: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return random(16, 9, seed=seed), random(16, 9, seed=seed + 1), random(16, 7, seed=seed + 2)


@given(st.integers(2, 300), st.floats(0.01, 0.5), st.integers(0, 5))
def test_the_choice_sees_rows_of_its_own(count: int, share: float, seed: int) -> None:
    fitted, held_out = split_rows(count, share, seed)
    assert len(fitted) >= 1
    assert len(held_out) == pytest.approx(share * count, abs=1)
    assert torch.equal(torch.cat([fitted, held_out]).sort().values, torch.arange(count)), "no row is in both"
    assert torch.equal(split_rows(count, share, seed)[1], held_out)


def test_a_single_row_serves_both() -> None:
    assert [rows.tolist() for rows in split_rows(1, 0.25, 0)] == [[0], [0]]


@pytest.mark.parametrize("steps", [1, 5, 6])
def test_batches_take_turns(steps: int) -> None:
    rows = fill(MemoryBudget(2**20), 40, [torch.arange(40.0)[:, None]], lambda x: x)
    data = PackData(rows, rows, rows)
    fitted, held_out = split_rows(40, 0.25, 0)
    kinds = [RandomBatches(data, 8, steps, seed, among) for seed, among in enumerate((fitted, held_out))]
    batches = [each[0][:, 0].long().tolist() for each in InTurns(*kinds, steps)]
    assert len(batches) == steps
    for step, drawn in enumerate(batches):
        assert set(drawn) <= set((held_out if step % 2 else fitted).tolist())
    assert all(set(a).isdisjoint(b) for a, b in pairwise(batches))


def test_every_second_step_moves_alpha_alone() -> None:
    search = search_of(part_of())
    configured = search.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.0]
    for step in range(1, 5):
        before = [p.detach().clone() for p in (*search.factors, *search.alphas)]
        optimizer.zero_grad()
        scheduler.step()
        search.training_step(batch(step), step).backward()
        search.on_before_optimizer_step(optimizer)
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, (*search.factors, *search.alphas), strict=True)]
        assert moved == ([False, False, True] if step % 2 else [True, True, False])


def test_alpha_has_the_gradient_of_the_held_out_batch_without_drop_path() -> None:
    part = part_of()
    search, layer = search_of(part), part.layers["a"]
    each = search.candidates[0]
    _, x, target = batch()
    quantized = ((x / 0.4).round() + 8).clamp(0, 15).sub(8).mul(0.4)
    alpha = torch.zeros(2, requires_grad=True)
    output = quantized @ layer.weight.T + layer.bias
    for share, up, down in zip(alpha.softmax(0), each.up.split((2, 3), 1), each.down.split((2, 3)), strict=True):
        output = output + share * each.spread * (quantized @ down.T @ up.T)
    expected = ((output - target) ** 2).sum(1).mean()
    loss = search.training_step(batch(), 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert torch.allclose(each.alpha.grad, torch.autograd.grad(expected, alpha)[0], rtol=1e-3)


def test_joint_order_computes_with_the_weights_rounded_to_nearest() -> None:
    part = part_of()
    search = search_of(part, (3,), LowRankSpec(search_steps=10, order="joint"))
    layer, each = part.layers["a"], search.candidates[0]
    loss = search.training_step(batch(), 0)
    loss.backward()
    assert all(factor.grad.abs().sum() > 0 for factor in search.factors)
    layer.compensation = each().detach()
    layer.weight_quantizer.mode = "nearest"
    expected = ((layer(batch()[1]) - batch()[2]) ** 2).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_layer_stays_as_it_is() -> None:
    part = part_of()
    layer = part.layers["a"]
    weight = layer.weight.clone()
    search = search_of(part)
    search.training_step(batch(), 0).backward()
    assert torch.equal(layer.weight, weight)
    assert layer.weight.grad is None
    assert (layer.trial, layer.compensation, layer.weight_quantizer.mode) == (None, None, "off")
    assert {id(p) for p in search.parameters() if p.requires_grad} == {id(p) for p in (*search.factors, *search.alphas)}
    assert not search.train().training


@pytest.mark.parametrize(("ranks", "rates"), [((2, 3), [1e-3, 3e-3]), ((3,), [0.0])])
def test_rates_at_the_end(ranks: tuple[int, ...], rates: list[float]) -> None:
    search = search_of(part_of(), ranks)
    assert search.is_search == (len(ranks) > 1)
    configured = search.configure_optimizers()
    for _ in range(10):
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert [group["lr"] for group in configured["optimizer"].param_groups] == pytest.approx(rates)
