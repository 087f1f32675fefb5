"""Uniform quantization against torch's own fake quantization, and LSQ's gradient against finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq.quant.affine import (
    LearnedStepQuantize,
    affine_parameters,
    code_limits,
    dequantize,
    fake_quantize,
    quantize,
)

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)
RANGES = st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)).map(sorted)


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def away_from_ties(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Tell where x / s is so far from a half that any order of operations rounds it alike."""
    return ((x / scale).frac().abs() - 0.5).abs() > 1e-3


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_limits_are_those_of_the_integer_types(bits: int) -> None:
    assert code_limits(bits, signed=False) == (0, 2**bits - 1)
    assert code_limits(bits, signed=True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if bits == 8:
        assert code_limits(8, signed=False) == (torch.iinfo(torch.uint8).min, torch.iinfo(torch.uint8).max)
        assert code_limits(8, signed=True) == (torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max)


@given(SEEDS, BITS, st.booleans())
def test_fake_quantize_is_torchs_per_tensor(seed: int, bits: int, symmetric: bool) -> None:
    x = values(seed, 5, 40)
    scale, zero_point = affine_parameters(x.min() * 0.7, x.max() * 0.7, bits, symmetric)
    limits = code_limits(bits, symmetric)
    ours = fake_quantize(x, scale, zero_point, limits)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), *limits)
    sure = away_from_ties(x, scale)
    assert torch.allclose(ours[sure], theirs[sure], atol=1e-5)


@given(SEEDS, BITS, st.booleans(), st.integers(0, 2))
def test_fake_quantize_is_torchs_per_channel(seed: int, bits: int, symmetric: bool, axis: int) -> None:
    x = values(seed, 3, 4, 5)
    shape = [1, 1, 1]
    shape[axis] = x.shape[axis]
    rows = x.transpose(0, axis).flatten(1)
    low, high = rows.amin(1).reshape(shape), rows.amax(1).reshape(shape)
    scale, zero_point = affine_parameters(low, high, bits, symmetric)
    limits = code_limits(bits, symmetric)
    ours = fake_quantize(x, scale, zero_point, limits)
    theirs = torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero_point.flatten().int(), axis, *limits)
    sure = away_from_ties(x, scale)
    assert torch.allclose(ours[sure], theirs[sure], atol=1e-5)


@given(RANGES, BITS, st.booleans())
def test_parameters_are_usable_for_every_range(ends: list[float], bits: int, symmetric: bool) -> None:
    low, high = torch.tensor(ends[0]), torch.tensor(ends[1])
    smallest, largest = code_limits(bits, symmetric)
    scale, zero_point = affine_parameters(low, high, bits, symmetric)
    assert scale > 0
    assert torch.isfinite(scale)
    assert zero_point == zero_point.round()
    assert smallest <= zero_point <= largest
    zero = torch.zeros(())
    assert fake_quantize(zero, scale, zero_point, (smallest, largest)) == 0, "0 must have a code (padding, ReLU)"
    ends_there = torch.stack([low.clamp(max=0), high.clamp(min=0)])
    error = (fake_quantize(ends_there, scale, zero_point, (smallest, largest)) - ends_there).abs().max()
    assert error <= scale * 0.5001 + 1e-6


@given(RANGES, BITS, st.booleans())
def test_quantizing_twice_changes_nothing(ends: list[float], bits: int, symmetric: bool) -> None:
    limits = code_limits(bits, symmetric)
    scale, zero_point = affine_parameters(torch.tensor(ends[0]), torch.tensor(ends[1]), bits, symmetric)
    codes = torch.arange(limits[0], limits[1] + 1.0)
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, limits), codes)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.0, 1e-45), (-1e-42, 1e-42), (-0.0, 0.0)])
def test_empty_ranges_give_scale_one(ends: tuple[float, float], symmetric: bool) -> None:
    low, high = torch.tensor([ends[0]]), torch.tensor([ends[1]])
    scale, zero_point = affine_parameters(low, high, 4, symmetric)
    assert scale.item() == 1
    assert fake_quantize(torch.zeros(3), scale, zero_point, code_limits(4, symmetric)).eq(0).all()


@given(SEEDS, BITS)
def test_learned_step_gives_fake_quantize_and_torchs_learnable_gradients(seed: int, bits: int) -> None:
    x = values(seed, 50).requires_grad_()
    limits = code_limits(bits, signed=False)
    scale, zero_point = affine_parameters(x.detach().min() * 0.6, x.detach().max() * 0.6, bits, symmetric=False)
    weights = values(seed + 1, 50)
    sure = away_from_ties(x.detach(), scale)
    weights = weights * sure
    ours, theirs = scale.clone().requires_grad_(), scale.reshape(1).clone().requires_grad_()
    y = LearnedStepQuantize.apply(x, ours, zero_point, limits)
    assert torch.equal(y, fake_quantize(x.detach(), scale, zero_point, limits))
    grad_x, grad_scale = torch.autograd.grad((y * weights).sum(), (x, ours))
    reference = torch._fake_quantize_learnable_per_tensor_affine(
        x, theirs, zero_point.reshape(1).clone().requires_grad_(), *limits, 1.0
    )
    ref_x, ref_scale = torch.autograd.grad((reference * weights).sum(), (x, theirs))
    assert torch.equal(grad_x, ref_x)
    assert torch.allclose(grad_scale, ref_scale.squeeze(), rtol=1e-3, atol=1e-3)


@given(SEEDS, st.integers(2, 6))
def test_scale_gradient_is_the_slope_where_values_are_clipped(seed: int, bits: int) -> None:
    """Outside the range the output is s (limit - z), so the straight-through estimate is the true derivative."""
    limits = code_limits(bits, signed=False)
    scale, zero_point = torch.tensor(0.1, dtype=torch.float64, requires_grad=True), torch.tensor(1.0).double()
    outside = torch.cat([values(seed, 9).double().abs() + 10, -values(seed, 9).double().abs() - 10])
    weights = values(seed + 2, 18).double()

    def loss(s: torch.Tensor) -> torch.Tensor:
        return (LearnedStepQuantize.apply(outside, s, zero_point, limits) * weights).sum()

    (slope,) = torch.autograd.grad(loss(scale), scale)
    step = 1e-5
    assert slope.item() == pytest.approx((loss(scale + step) - loss(scale - step)).item() / (2 * step), abs=1e-5)


def test_scale_gradient_inside_is_rounding_error_in_steps() -> None:
    """LSQ, eq. 3: round(x/s) - x/s; it equals the slope of the output minus the slope a straight line would have."""
    x, scale = torch.tensor([0.26, -0.31, 0.99]), torch.tensor(0.2, requires_grad=True)
    for i in range(3):
        y = LearnedStepQuantize.apply(x[i], scale, torch.tensor(8.0), (0, 15))
        (slope,) = torch.autograd.grad(y, scale)
        step = 1e-3
        outputs = [fake_quantize(x[i], scale.detach() + d, torch.tensor(8.0), (0, 15)) for d in (step, -step)]
        finite = (outputs[0] - outputs[1]) / (2 * step)
        assert slope.item() == pytest.approx((finite - x[i] / scale.detach()).item(), abs=1e-3)


def test_fixed_scale_gets_no_gradient() -> None:
    x = torch.randn(8, requires_grad=True)
    y = LearnedStepQuantize.apply(x, torch.tensor(0.5), torch.tensor(2.0), (0, 3))
    y.sum().backward()
    inside = (torch.round(x.detach() / 0.5) + 2 >= 0) & (torch.round(x.detach() / 0.5) + 2 <= 3)
    assert torch.equal(x.grad, inside.float())
