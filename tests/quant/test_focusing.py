"""The focusing quantizer: integer arithmetic, torch's fake quantization, finite differences and brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pack_ptq.quant.affine import affine_parameters, code_limits, dequantize, fake_quantize, quantize
from pack_ptq.quant.focusing import FocusingQuantize, focusing_bounds, focusing_codes, focusing_quantize
from pack_ptq.quant.observers import BINS

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)
LOWERS = st.floats(0, 0.5, width=32)
SCALES = st.floats(2**-10, 0.5, width=32)


def values(seed: int, count: int = 200, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 0.3


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


def squared_error(centers: Tensor, weights: Tensor, lower: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Give the error of one window, or of many that are columns."""
    with torch.no_grad():
        return (focusing_quantize(centers, lower, scale, bits) - centers).square() @ weights


def window_error(centers: Tensor, weights: Tensor, lower: Tensor, upper: Tensor, bits: int) -> float:
    return squared_error(centers, weights, lower, (upper - lower) / (2**bits - 1), bits).min().item()


def searched_error(centers: Tensor, weights: Tensor, bits: int) -> float:
    lower, scale = focusing_bounds(centers, weights, bits)
    return squared_error(centers, weights, lower.double(), scale.double(), bits).item()


@given(SEEDS, LOWERS, SCALES, BITS)
def test_values_are_integer_codes_times_scale_plus_lower(seed: int, lower: float, scale: float, bits: int) -> None:
    x, b1, s = values(seed), torch.tensor(lower), torch.tensor(scale)
    codes = focusing_codes(x, b1, s, bits)
    integers = codes.to(torch.uint8)
    assert torch.equal(integers.float(), codes)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert torch.equal(focusing_quantize(x, b1, s, bits), integers * s + b1)


@given(SEEDS, LOWERS, SCALES, BITS)
def test_ends_are_those_of_the_window(seed: int, lower: float, scale: float, bits: int) -> None:
    b1, s = torch.tensor(lower), torch.tensor(scale)
    b2 = b1 + s * (2**bits - 1)
    away = values(seed).abs() + 1e-3
    assert focusing_codes(b1 - away, b1, s, bits).eq(0).all()
    assert focusing_quantize(b1 - away, b1, s, bits).eq(b1).all()
    assert focusing_codes(b2 + away, b1, s, bits).eq(2**bits - 1).all()
    assert focusing_quantize(b2 + away, b1, s, bits).eq(b2).all()


@given(SEEDS, st.integers(0, 20), SCALES, st.integers(2, 6))
def test_is_a_clip_and_a_plain_quantizer_where_lower_is_a_multiple(seed: int, k: int, scale: float, bits: int) -> None:
    x, s, zero = values(seed, dtype=torch.float64), torch.tensor(scale).double(), torch.zeros(()).double()
    n = 2**bits - 1
    b1 = k * s
    x = x[(((x / s).frac().abs() - 0.5).abs() > 1e-6)]
    clipped = x.clamp(b1, b1 + n * s)
    ours, codes = focusing_quantize(x, b1, s, bits), focusing_codes(x, b1, s, bits)
    plain = quantize(clipped, s, zero, (0, k + n))
    assert torch.equal(codes + k, plain)
    assert torch.allclose(ours, dequantize(plain, s, zero), rtol=1e-12)
    theirs = torch.fake_quantize_per_tensor_affine(clipped, s.item(), 0, 0, k + n)
    assert torch.allclose(ours, theirs, rtol=1e-5)


@given(SEEDS, SCALES, BITS)
def test_from_zero_it_is_the_plain_quantizer(seed: int, scale: float, bits: int) -> None:
    x, s, zero = values(seed), torch.tensor(scale), torch.zeros(())
    assert torch.equal(focusing_quantize(x, zero, s, bits), fake_quantize(x, s, zero, code_limits(bits, signed=False)))


@given(SEEDS, LOWERS, SCALES, BITS)
def test_quantizing_twice_changes_nothing(seed: int, lower: float, scale: float, bits: int) -> None:
    b1, s = torch.tensor(lower), torch.tensor(scale)
    once = focusing_quantize(values(seed), b1, s, bits)
    assert torch.equal(focusing_quantize(once, b1, s, bits), once)


@given(SEEDS, LOWERS, SCALES, BITS)
def test_order_is_kept_and_errors_are_half_a_step(seed: int, lower: float, scale: float, bits: int) -> None:
    x, b1, s = values(seed).sort().values, torch.tensor(lower), torch.tensor(scale)
    y = focusing_quantize(x, b1, s, bits)
    assert (y.diff() >= 0).all()
    clipped = x.clamp(b1, b1 + s * (2**bits - 1))
    assert ((y - clipped).abs() <= s * 0.5001 + 1e-6).all()


@given(SEEDS, LOWERS, SCALES, BITS)
def test_outputs_agree_with_and_without_gradients(seed: int, lower: float, scale: float, bits: int) -> None:
    x, b1, s = values(seed), torch.tensor(lower), torch.tensor(scale)
    with torch.no_grad():
        plain = focusing_quantize(x, b1, s, bits)
    assert torch.equal(focusing_quantize(x.requires_grad_(), b1, s, bits), plain)


def soft_form(x: Tensor, b1: Tensor, s: Tensor, bits: int, residual: Tensor, side: Tensor) -> Tensor:
    """Give the output with rounding errors and sides of the window held fixed."""
    ends = torch.where(side < 0, b1, b1 + s * (2**bits - 1))
    return torch.where(side == 0, x + s * residual, ends)


@given(SEEDS, st.floats(0, 0.5), st.floats(1e-3, 0.5), BITS)
def test_gradients_are_finite_differences_of_the_soft_form(seed: int, lower: float, scale: float, bits: int) -> None:
    x, b1, s = values(seed, dtype=torch.float64).requires_grad_(), scalar(lower), scalar(scale)
    grad = normal(seed + 1, len(x))
    y = focusing_quantize(x, b1, s, bits)
    slopes = torch.autograd.grad(y, (x, b1, s), grad)
    with torch.no_grad():
        steps = (x - b1) / s
        side = (steps > 2**bits - 1).long() - (steps < 0).long()
        residual = steps.round() - steps

        def soft(dx: float = 0, db1: float = 0, ds: float = 0) -> Tensor:
            return soft_form(x + dx, b1 + db1, s + ds, bits, residual, side) * grad

        assert torch.allclose(soft().sum(), (y * grad).sum())
        h = 1e-6
        assert torch.allclose(slopes[0], (soft(dx=h) - soft(dx=-h)) / (2 * h), atol=1e-6)
        for slope, up, down in ((slopes[1], soft(db1=h), soft(db1=-h)), (slopes[2], soft(ds=h), soft(ds=-h))):
            assert slope.item() == pytest.approx(((up - down) / (2 * h)).sum().item(), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(("offset", "slope_lower", "slope_scale"), [(-0.1, 1.0, 0.0), (0.1, 1.0, 7.0)])
def test_slopes_are_the_true_ones_where_values_are_clipped(
    offset: float, slope_lower: float, slope_scale: float
) -> None:
    b1, s = scalar(0.2), scalar(0.05)
    x = scalar((0.2 if offset < 0 else 0.55) + offset)
    slopes = torch.autograd.grad(focusing_quantize(x, b1, s, 3), (x, b1, s))
    assert [slope.item() for slope in slopes] == [0, slope_lower, slope_scale]
    h = 1e-5
    by_lower = focusing_quantize(x, b1 + h, s, 3) - focusing_quantize(x, b1 - h, s, 3)
    by_scale = focusing_quantize(x, b1, s + h, 3) - focusing_quantize(x, b1, s - h, 3)
    assert (by_lower / (2 * h)).item() == pytest.approx(slope_lower, abs=1e-6)
    assert (by_scale / (2 * h)).item() == pytest.approx(slope_scale, abs=1e-6)


def test_kept_elements_go_through_and_leave_the_window_alone() -> None:
    x = values(1, dtype=torch.float64).requires_grad_()
    kept = (normal(2, len(x)) > 0).double()
    grad = normal(3, len(x))
    b1, s = scalar(0.2), scalar(0.1)
    y = focusing_quantize(x, b1, s, 3, kept)
    plain = focusing_quantize(x, b1, s, 3)
    assert torch.equal(y, torch.where(kept.bool(), x, plain))
    grad_x, grad_lower, grad_scale = torch.autograd.grad(y, (x, b1, s), grad)
    plain_x, plain_lower, plain_scale = torch.autograd.grad(plain, (x, b1, s), grad * (1 - kept))
    assert torch.equal(grad_x, torch.where(kept.bool(), grad, plain_x))
    assert torch.allclose(grad_lower, plain_lower)
    assert torch.allclose(grad_scale, plain_scale)
    with torch.no_grad():
        assert torch.equal(focusing_quantize(x, b1, s, 3, kept), y)


@pytest.mark.parametrize("learned", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_each_gradient_alone_is_the_same(learned: tuple[int, int, int]) -> None:
    def slopes(wanted: tuple[int, int, int]) -> list[Tensor | None]:
        leaves = [values(4, dtype=torch.float64), scalar(0.2).detach(), scalar(0.1).detach()]
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(bool(want))
        FocusingQuantize.apply(*leaves, 3).backward(normal(5, len(leaves[0])))
        return [leaf.grad for leaf in leaves]

    for alone, together, wanted in zip(slopes(learned), slopes((1, 1, 1)), learned, strict=True):
        assert (alone is None) == (not wanted)
        assert alone is None or torch.equal(alone, together)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_keep_their_type(dtype: torch.dtype) -> None:
    x = values(6).to(dtype).requires_grad_()
    b1, s = torch.tensor(0.25, requires_grad=True), torch.tensor(0.125, requires_grad=True)
    y = focusing_quantize(x, b1, s, 3, torch.zeros_like(x))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert b1.grad.dtype == s.grad.dtype == torch.float32


def test_nan_stays_visible() -> None:
    x = torch.tensor([0.1, torch.nan, torch.inf], requires_grad=True)
    y = focusing_quantize(x, torch.tensor(0.0), torch.tensor(0.1, requires_grad=True), 2)
    assert torch.equal(y.isnan(), torch.tensor([False, True, False]))
    assert y[2].item() == pytest.approx(0.3)


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_search_is_no_worse_than_minmax_or_any_window_from_zero(spread: float, bits: int) -> None:
    centers, weights = histogram(probabilities(spread))
    found = searched_error(centers, weights, bits)
    zero = torch.zeros(1, 1).double()
    from_zero = window_error(centers, weights, zero, torch.logspace(-3, 0, 400).double()[:, None], bits)
    assert found <= from_zero * 1.0001
    assert found <= window_error(centers, weights, centers[0], centers[-1], bits)


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_is_as_good_as_a_dense_grid(spread: float, bits: int) -> None:
    centers, weights = histogram(probabilities(spread))
    shares = weights.cumsum(0) / weights.sum()
    uppers = torch.logspace(0, -3, 120).double()[:, None] * centers[-1]
    lowers = [0, *centers[torch.searchsorted(shares, torch.linspace(0, 0.95, 30).double())]]
    best = min(window_error(centers, weights, b1 * torch.ones(1, 1), uppers[uppers[:, 0] > b1], bits) for b1 in lowers)
    assert searched_error(centers, weights, bits) <= best * 1.01


@pytest.mark.parametrize("spread", [1.0, 2.0, 3.0])
def test_three_bits_beat_a_minmax_quantizer_on_softmax_outputs(spread: float) -> None:
    x = probabilities(spread)
    lower, scale = focusing_bounds(*histogram(x), bits=3)
    focused = (focusing_quantize(x, lower, scale, 3) - x).square().mean()
    plain_scale, zero_point = affine_parameters(x.min(), x.max(), 3, symmetric=False)
    plain = (fake_quantize(x, plain_scale, zero_point, (0, 7)) - x).square().mean()
    assert focused < 0.8 * plain
    assert 0 < lower < 1 / 197 < lower + 7 * scale < x.max(), "the window lies where the values crowd"


@given(SEEDS, st.integers(1, 50), BITS)
@settings(max_examples=50)
def test_any_histogram_gives_a_valid_window(seed: int, bins: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(bins, generator=generator, dtype=torch.float64).sort().values - 0.2
    weights = torch.randint(0, 3, (bins,), generator=generator).double()
    lower, scale = focusing_bounds(centers, weights, bits)
    assert lower.dtype == scale.dtype == torch.float32
    assert lower.shape == scale.shape == ()
    assert lower >= 0
    assert scale > 0
    held = centers[weights > 0].clamp(min=0)
    if len(held) > 1 and held[-1] > 0:
        found = searched_error(centers, weights, bits)
        for smallest in (held[0], torch.zeros(())):
            assert found <= window_error(centers, weights, smallest, held[-1], bits) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("value", [0.3, 1e-45, 1e30])
def test_one_bin_has_an_exact_code(bits: int, value: float) -> None:
    weights = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)
    centers = torch.tensor([-value, value, 2 * value], dtype=torch.float64)
    lower, scale = focusing_bounds(centers, weights, bits)
    assert lower == 0
    assert scale > 0
    x = torch.tensor([value])
    assert torch.allclose(focusing_quantize(x, lower, scale, bits), x)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(
    ("centers", "weights"),
    [([], []), ([0.1, 0.2], [0, 0]), ([0.0], [3]), ([-2.0, -1.0], [3, 4]), ([0.1, 0.2], [torch.nan, torch.nan])],
    ids=["no bins", "empty", "zeros", "negative", "nan"],
)
def test_without_values_above_zero_the_window_is_that_of_probabilities(
    centers: list[float], weights: list[float], bits: int
) -> None:
    wide = torch.tensor(centers, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    lower, scale = focusing_bounds(*wide, bits)
    assert lower == 0
    assert scale.item() == pytest.approx(1 / (2**bits - 1))


def test_bins_of_unequal_width_are_taken_as_they_are() -> None:
    x = probabilities(2.0).double()
    edges = torch.logspace(-7, 0, BINS + 1, dtype=torch.float64)
    weights = torch.histogram(x.flatten(), edges).hist
    lower, scale = focusing_bounds((edges[1:] * edges[:-1]).sqrt(), weights, 3)
    even_lower, even_scale = focusing_bounds(*histogram(x), 3)
    assert lower == pytest.approx(even_lower.item(), rel=0.1)
    assert scale == pytest.approx(even_scale.item(), rel=0.1)


def test_one_value_above_zero_among_negative_ones_has_a_window() -> None:
    """The only two bins are further apart than the window is wide."""
    centers, weights = torch.tensor([-0.9, 0.2], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    lower, scale = focusing_bounds(centers, weights, bits=2)
    assert lower == 0
    assert scale.item() == pytest.approx(0.2 / 3)
