"""Low-rank candidates: what they add to a weight, and the choice between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pack_ptq.quant.low_rank import LowRankCandidates, ranks_below, straight_through
from pack_ptq.quant.quantizers import WeightQuantizer
from pack_ptq.types import QuantizerSpec

RANKS = (2, 3, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def candidates(ranks: tuple[int, ...] = RANKS, seed: int = 0) -> LowRankCandidates:
    """Give candidates for a weight of 7 x 9 whose every variable has moved."""
    each = LowRankCandidates(torch.randn(7, 9, generator=generator(1)), ranks, generator(seed))
    with torch.no_grad():
        for parameter in each.parameters():
            parameter += torch.randn(parameter.shape, generator=generator(2))
    return each


@given(st.integers(1, 400), st.integers(1, 400))
def test_ranks_lie_below_both_sizes(outputs: int, inputs: int) -> None:
    ranks = ranks_below((outputs, inputs), (10, 20, 50, 100, 150))
    if min(outputs, inputs) > 10:
        assert ranks == tuple(rank for rank in (10, 20, 50, 100, 150) if rank < min(outputs, inputs))
    else:
        assert ranks == (max(1, min(outputs, inputs) // 2),)


def test_compensation_begins_at_nothing() -> None:
    each = LowRankCandidates(torch.randn(7, 9), RANKS, generator())
    assert torch.equal(each(), torch.zeros(7, 9))
    assert (each.up.shape, each.down.shape) == ((7, 10), (10, 9))


@pytest.mark.parametrize("kept", [None, torch.tensor([0.0, 1.25, 1.25])])
def test_merged_weight_computes_the_sum_over_the_candidates(kept: Tensor | None) -> None:
    each = candidates()
    x = torch.randn(4, 9, generator=generator(3))
    share = each.alpha.softmax(0)
    ups, downs = each.up.split(RANKS, 1), each.down.split(RANKS, 0)
    phi = torch.ones(3) if kept is None else kept
    expected = sum(phi[j] * share[j] * each.spread * (x @ downs[j].T @ ups[j].T) for j in range(3))
    assert torch.allclose(x @ each(kept).T, expected, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(each.parameters()), retain_graph=True)
    given_ = torch.autograd.grad((x @ each(kept).T).square().sum(), list(each.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(given_, wanted, strict=True))


def test_ranks_start_fair_under_adam() -> None:
    """The first step moves each weight by about the rate times the root mean square of the weights."""
    weight = 0.01 * torch.randn(200, 300, generator=generator(1))
    moved = []
    for rank in (10, 40, 150):
        each = LowRankCandidates(weight, (rank,), generator(2))
        optimizer = torch.optim.Adam(each.parameters(), lr=1e-3)
        (each() * torch.randn(200, 300, generator=generator(3))).sum().backward()
        optimizer.step()
        moved.append(each().detach().square().mean().sqrt().item() / 0.01)
    assert moved == pytest.approx([1e-3] * 3, rel=0.2)


def test_drop_path_keeps_the_mean() -> None:
    each, source = candidates(), generator(4)
    drawn = torch.stack([each.draw_kept(0.2, source) for _ in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.25}
    assert torch.allclose(drawn.mean(0), torch.ones(3), atol=0.03)
    assert torch.equal(each.draw_kept(0.0, source), torch.ones(3))
    alone = candidates((4,))
    assert all(alone.draw_kept(0.9, source) == 1 for _ in range(20))
    assert not alone.alpha.requires_grad


@pytest.mark.parametrize("best", [0, 1, 2])
def test_choice_keeps_the_largest_alpha_as_it_is(best: int) -> None:
    each = candidates()
    with torch.no_grad():
        each.alpha[best] = 9.0
    up, down = each.up.split(RANKS, 1)[best], each.down.split(RANKS, 0)[best]
    assert each.choose() == RANKS[best]
    assert torch.allclose(each(), each.spread * up @ down, atol=1e-6)
    assert (each.ranks, each.alpha.requires_grad) == ((RANKS[best],), False)
    assert torch.linalg.matrix_rank(each().detach()) == RANKS[best]


@pytest.mark.parametrize("symmetric", [False, True])
def test_straight_through_has_the_nearest_values_and_the_gradient_inside_the_range(symmetric: bool) -> None:
    weight = torch.randn(7, 9, generator=generator(1)).requires_grad_()
    quantizer = WeightQuantizer(channel_axis=0)
    quantizer.set_range(0.5 * weight, QuantizerSpec(bits=3), symmetric)
    slope = torch.randn(7, 9, generator=generator(2))
    rounded = straight_through(weight, quantizer)
    assert quantizer.mode == "off"
    quantizer.mode = "nearest"
    assert torch.allclose(rounded, quantizer(weight), atol=1e-6)
    codes = weight / quantizer.scale + quantizer.zero_point
    inside = (codes > quantizer.limits[0]) & (codes < quantizer.limits[1])
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(torch.autograd.grad((rounded * slope).sum(), weight)[0], slope * inside)
