"""The log-sqrt2 quantizer against plain numpy, RepQ-ViT's search and finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pack_ptq.quant.log_sqrt2 import (
    LARGEST_RATIO,
    log_sqrt2_codes,
    log_sqrt2_dequantize,
    log_sqrt2_quantize,
    log_sqrt2_scale,
)
from pack_ptq.quant.observers import BINS

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)
SCALES = st.floats(2**-10, 2)
SHIFTS = st.floats(-0.25, 0.25).map(lambda shift: torch.tensor(shift, dtype=torch.float64))


def values(seed: int, count: int = 200) -> Tensor:
    """Give values over many octaves, some of them not positive."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64).mul(4).exp2()
    return torch.where(torch.rand(count, generator=generator) < 0.1, -x, x)


def normal(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def probabilities(spread: float, tokens: int = 197) -> Tensor:
    logits = torch.randn(4, 3, tokens, tokens, generator=torch.Generator().manual_seed(7)) * spread
    return logits.softmax(-1)


def histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.min().item(), x.max().item()
    centers = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * (high - low) / BINS
    return centers, torch.histc(x.float(), BINS, low, high).double()


def oracle(x: np.ndarray, scale: float, bits: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Give codes and values, and leave out no case."""
    codes, outputs = [], []
    for value in x:
        code = 2**bits - 1
        if value > shift:
            code = min(max(round(-2 * np.log2((value - shift) / scale)), 0), 2**bits - 1)
        codes.append(code)
        outputs.append(shift if code == 2**bits - 1 else scale * np.sqrt(2.0) ** -code + shift)
    return np.array(codes), np.array(outputs)


def away_from_ties(x: Tensor, scale: float, shift: Tensor) -> Tensor:
    exponents = -2 * ((x - shift) / scale).clamp(min=1e-300).log2()
    return ((exponents.frac().abs() - 0.5).abs() > 1e-6) & ((x - shift).abs() > 1e-12)


@given(SEEDS, SCALES, BITS, SHIFTS)
def test_is_the_formula_in_numpy(seed: int, scale: float, bits: int, shift: Tensor) -> None:
    x = values(seed)
    x = torch.cat([x[away_from_ties(x, scale, shift)], shift[None]])
    codes, outputs = oracle(x.numpy(), scale, bits, shift.item())
    s = torch.tensor(scale, dtype=torch.float64)
    assert np.array_equal(log_sqrt2_codes(x, s, bits, shift).numpy(), codes)
    assert np.allclose(log_sqrt2_quantize(x, s, bits, shift).numpy(), outputs, rtol=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_stand_for_powers_and_the_largest_for_zero(bits: int) -> None:
    codes, s = torch.arange(2.0**bits), torch.tensor(0.75)
    outputs = log_sqrt2_dequantize(codes, s, bits)
    assert outputs[0] == 0.75
    assert torch.allclose(outputs[2:-1], outputs[:-3] / 2)
    assert outputs[-1] == 0
    assert (outputs.diff() < 0).all()
    assert torch.equal(log_sqrt2_codes(outputs, s, bits), codes)


@given(SEEDS, SCALES, BITS, SHIFTS)
def test_quantizing_twice_changes_nothing(seed: int, scale: float, bits: int, shift: Tensor) -> None:
    s = torch.tensor(scale, dtype=torch.float64)
    shift = shift if bits < 6 else torch.zeros_like(shift)  # values of large codes are lost beside a shift
    once = log_sqrt2_quantize(values(seed), s, bits, shift)
    assert torch.allclose(log_sqrt2_quantize(once, s, bits, shift), once, rtol=1e-12)


@given(SEEDS, SCALES, BITS, SHIFTS)
def test_order_and_range_are_kept(seed: int, scale: float, bits: int, shift: Tensor) -> None:
    x, s = values(seed).sort().values, torch.tensor(scale, dtype=torch.float64)
    y = log_sqrt2_quantize(x, s, bits, shift)
    assert (y.diff() >= 0).all()
    assert ((y >= shift) & (y <= s + shift)).all()
    assert y.unique().numel() <= 2**bits
    smallest = (s * 2 ** (1 - 2 ** (bits - 1))).item()  # of code 2^bits - 2
    inside = (x - shift >= smallest) & (x - shift <= s)
    ratio = ((y - shift) / (x - shift))[inside]
    assert ((ratio >= 2**-0.2501) & (ratio <= 2**0.2501)).all(), "the error is a factor of at most 2^(1/4)"


@given(SEEDS, SCALES, BITS, SHIFTS)
def test_outputs_agree_with_and_without_gradients(seed: int, scale: float, bits: int, shift: Tensor) -> None:
    x, s = values(seed), torch.tensor(scale, dtype=torch.float64)
    with torch.no_grad():
        plain = log_sqrt2_quantize(x, s, bits, shift)
    assert torch.equal(log_sqrt2_quantize(x.requires_grad_(), s, bits, shift), plain)


@given(SEEDS, SCALES, BITS, SHIFTS)
def test_gradients_are_finite_differences_of_the_soft_form(seed: int, scale: float, bits: int, shift: Tensor) -> None:
    """With the rounding error in units of s held fixed the output is x + s r, as for a uniform quantizer."""
    x, s = values(seed).requires_grad_(), scalar(scale)
    grad = normal(seed + 1, len(x))
    y = log_sqrt2_quantize(x, s, bits, shift)
    slopes = torch.autograd.grad(y, (x, s), grad)
    with torch.no_grad():
        residual = (y - x) / s
        side = ((x - shift) / s > LARGEST_RATIO).long() - (x < shift).long()

        def soft(dx: float = 0, ds: float = 0) -> Tensor:
            ends = torch.where(side < 0, shift, s + ds + shift)
            return torch.where(side == 0, x + dx + (s + ds) * residual, ends) * grad

        h = 1e-6
        assert torch.allclose(soft(), y * grad)
        assert torch.allclose(slopes[0], (soft(dx=h) - soft(dx=-h)) / (2 * h), atol=1e-6)
        finite = (soft(ds=h) - soft(ds=-h)).sum().item() / (2 * h)
        assert slopes[1].item() == pytest.approx(finite, rel=1e-5, abs=1e-4)


@given(SEEDS, SCALES, BITS)
def test_gradients_fit_an_output_that_is_homogeneous(seed: int, scale: float, bits: int) -> None:
    """Twice the input and twice the scale give twice the output, so Euler's identity holds."""
    x, s = values(seed).requires_grad_(), scalar(scale)
    grad = normal(seed + 1, len(x))
    y = log_sqrt2_quantize(x, s, bits)
    grad_x, grad_scale = torch.autograd.grad(y, (x, s), grad)
    euler = (grad_x * x).sum() + grad_scale * s
    assert euler.item() == pytest.approx((y * grad).sum().item(), rel=1e-9, abs=1e-6)


def test_slopes_are_the_true_ones_where_values_are_clipped() -> None:
    for value, expected in ((0.9, [0, 1]), (-0.1, [0, 0])):
        x, s = scalar(value), scalar(0.5)
        slopes = torch.autograd.grad(log_sqrt2_quantize(x, s, 3), (x, s))
        assert [slope.item() for slope in slopes] == expected
        change = log_sqrt2_quantize(x, s + 1e-5, 3) - log_sqrt2_quantize(x, s - 1e-5, 3)
        assert change.item() / 2e-5 == pytest.approx(expected[1], abs=1e-6)


def test_kept_elements_go_through_and_leave_the_scale_alone() -> None:
    x, s = values(1).requires_grad_(), scalar(0.5)
    kept = (normal(2, len(x)) > 0).double()
    grad = normal(3, len(x))
    shift = torch.tensor(0.01)
    y, plain = log_sqrt2_quantize(x, s, 3, shift, kept), log_sqrt2_quantize(x, s, 3, shift)
    assert torch.equal(y, torch.where(kept.bool(), x, plain))
    grad_x, grad_scale = torch.autograd.grad(y, (x, s), grad)
    plain_x, plain_scale = torch.autograd.grad(plain, (x, s), grad * (1 - kept))
    assert torch.equal(grad_x, torch.where(kept.bool(), grad, plain_x))
    assert torch.allclose(grad_scale, plain_scale)
    with torch.no_grad():
        assert torch.equal(log_sqrt2_quantize(x, s, 3, shift, kept), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_floats_keep_their_type(dtype: torch.dtype) -> None:
    x, s = values(6).to(dtype).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    y = log_sqrt2_quantize(x, s, 3, kept=torch.zeros_like(x))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert s.grad.dtype == torch.float32


def test_nan_stays_visible() -> None:
    x = torch.tensor([0.1, torch.nan, torch.inf])
    y = log_sqrt2_quantize(x, torch.tensor(0.5, requires_grad=True), 3)
    assert torch.equal(y.isnan(), torch.tensor([False, True, False]))
    assert y[2] == 0.5


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 0.001])
def test_search_is_as_good_as_brute_force_and_repqs_percentiles(spread: float, bits: int, offset: float) -> None:
    x, shift = probabilities(spread), torch.tensor(offset)
    centers, weights = histogram(x)

    def error(scale: Tensor) -> float:
        with torch.no_grad():
            return ((log_sqrt2_quantize(centers, scale.double(), bits, shift) - centers).square() @ weights).item()

    found = log_sqrt2_scale(centers, weights, bits, shift)
    assert found.dtype == torch.float32
    assert found.shape == ()
    top = centers[-1] - shift
    assert error(found) <= 1.02 * min(error(top * share) for share in torch.logspace(-3, 0.07, 400).double())
    percentiles = torch.from_numpy(np.percentile(x.numpy(), [99.9, 99.99, 99.999]))
    assert error(found) <= 1.02 * min(error(percentile - shift) for percentile in percentiles)


@pytest.mark.parametrize(
    ("centers", "weights"),
    [([], []), ([0.1, 0.2], [0, 0]), ([0.0], [3]), ([-2.0, -1.0], [3, 4]), ([1e-45], [2])],
    ids=["no bins", "empty", "zeros", "negative", "subnormal"],
)
def test_without_values_above_the_shift_the_scale_is_one(centers: list[float], weights: list[float]) -> None:
    wide = torch.tensor(centers, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    assert log_sqrt2_scale(*wide, 3) == 1


@pytest.mark.parametrize("bits", [2, 8])
def test_one_bin_has_an_exact_code(bits: int) -> None:
    centers, weights = torch.tensor([0.3], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    shift = torch.tensor(0.1)
    scale = log_sqrt2_scale(centers, weights, bits, shift)
    assert torch.allclose(log_sqrt2_quantize(centers, scale.double(), bits, shift), centers, rtol=1e-6)
