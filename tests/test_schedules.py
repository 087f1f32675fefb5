"""Schedules against METHOD P3: penalty off in the first 20 %, beta from 20 to 2 linearly, rates to 0 as a cosine."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq.schedules import (
    cosine_to_zero,
    curriculum_share,
    evaluation_steps,
    penalty_beta,
    rate_at_bits,
    rounding_rate,
)
from pack_ptq.types import ReconstructionSpec

SPEC = ReconstructionSpec()


def test_beta_by_hand() -> None:
    assert [penalty_beta(step, 100, SPEC) for step in (0, 19)] == [None, None]
    assert [penalty_beta(step, 100, SPEC) for step in (20, 40, 60, 100)] == pytest.approx([20, 15.5, 11, 2])


@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 30), st.floats(0, 30))
def test_beta_is_linear_between_its_ends(steps: int, start: float, first: float, last: float) -> None:
    spec = ReconstructionSpec(penalty_start=start, beta=(first, last))
    values = [penalty_beta(step, steps, spec) for step in range(steps)]
    betas = [v for v in values if v is not None]
    off = len(values) - len(betas)
    assert values[:off] == [None] * off
    assert off == math.ceil(start * steps)
    low, high = sorted((first, last))
    assert all(low - 1e-9 <= beta <= high + 1e-9 for beta in betas)
    slopes = [b - a for a, b in pairwise(betas)]
    assert slopes == pytest.approx([slopes[0]] * len(slopes), abs=1e-6) if slopes else True


def test_fewer_steps_have_higher_rates_of_rounding() -> None:
    assert rounding_rate(7e-3, 1000) == 7e-3
    assert [rounding_rate(1.0, steps) for steps in (10, 250, 4000)] == pytest.approx([10, 2, 0.5])
    assert rounding_rate(1.0, 0) == rounding_rate(1.0, 1)


@given(st.integers(1, 400))
def test_cosine_is_torchs(steps: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    assert cosine_to_zero(0, steps) == 1
    for step in range(1, min(steps, 30) + 1):
        optimizer.step()
        schedule.step()
        assert cosine_to_zero(step, steps) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
    assert cosine_to_zero(steps, steps) == pytest.approx(0)
    assert cosine_to_zero(steps + 5, steps) == pytest.approx(0)


@given(st.integers(1, 5000), st.integers(1, 20))
def test_evaluations_lie_in_the_second_half_and_at_the_end(steps: int, count: int) -> None:
    chosen = evaluation_steps(steps, count)
    assert steps in chosen
    assert len(chosen) <= count
    assert all(steps // 2 <= step <= steps and step >= 1 for step in chosen)
    if steps >= 4 * count:
        assert len(chosen) == count


def test_evaluations_by_hand() -> None:
    assert evaluation_steps(1000, 4) == {625, 750, 875, 1000}
    assert evaluation_steps(1, 4) == {1}


@given(st.integers(1, 5000), st.floats(0.01, 1))
def test_curriculum_grows_to_everything(steps: int, start: float) -> None:
    shares = [curriculum_share(step, steps, start) for step in range(0, steps + 1, max(1, steps // 20))]
    assert shares[0] == pytest.approx(start)
    assert shares == sorted(shares)
    assert curriculum_share(steps, steps, start) == pytest.approx(1)
    assert curriculum_share(2 * steps, steps, start) == pytest.approx(1)
    assert curriculum_share(3, 4, 0.5) == 0.875


def test_tuning_rates_fall_above_three_bits() -> None:
    assert [rate_at_bits(bits, 2) for bits in (2, 3)] == [1, 1]
    assert rate_at_bits(4, 2) == pytest.approx((7 / 15) ** 2)
    assert rate_at_bits(4, 4) == pytest.approx((7 / 15) ** 4)
    assert all(rate_at_bits(bits + 1, 0.5) < rate_at_bits(bits, 0.5) for bits in range(3, 8))
    assert [rate_at_bits(bits, 0) for bits in range(2, 9)] == [1] * 7
