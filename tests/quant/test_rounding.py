"""AdaRound's soft rounding: its start, its ends, its penalty."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq.quant.rounding import rounding_penalty, rounding_start, settled, soft_rounding


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_start_inverts_soft_rounding(remainders: list[float]) -> None:
    wanted = torch.tensor(remainders)
    start = rounding_start(wanted)
    assert torch.isfinite(start).all()
    assert torch.allclose(soft_rounding(start), wanted, atol=1e-6)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20))
def test_formula_of_the_paper(variables: list[float]) -> None:
    v = torch.tensor(variables)
    h = soft_rounding(v)
    assert torch.allclose(h.double(), (1.2 * torch.sigmoid(v.double()) - 0.1).clamp(0, 1), atol=1e-6)
    assert ((h >= 0) & (h <= 1)).all()
    for beta in (20.0, 2.0):
        expected = sum(1 - abs(2 * value - 1) ** beta for value in h.double().tolist())
        assert rounding_penalty(v, beta).item() == pytest.approx(expected, abs=1e-4)


def test_penalty_is_zero_only_when_settled() -> None:
    assert rounding_penalty(torch.tensor([-9.0, 9.0]), 2.0) == 0
    assert rounding_penalty(torch.tensor([0.0]), 2.0) == 1


def test_penalty_pushes_to_the_nearer_end() -> None:
    v = torch.tensor([-0.5, 0.5], requires_grad=True)
    rounding_penalty(v, 2.0).backward()
    assert v.grad[0] > 0
    assert v.grad[1] < 0


def test_gradient_vanishes_where_rounding_is_settled() -> None:
    v = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
    soft_rounding(v).sum().backward()
    assert v.grad[0] == v.grad[2] == 0
    assert v.grad[1] > 0


def test_settled_counts_values_near_the_ends() -> None:
    h = torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0])
    assert settled(rounding_start(h)) == 4
    assert settled(rounding_start(h), margin=0.1) == 6
