"""Ranges of channels: numpy's extremes and histograms and a plain search are the oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pack_ptq.quant.affine import affine_parameters, code_limits, fake_quantize
from pack_ptq.quant.channel_observer import BINS, ChannelObserver

SHARES = [1 - i / 100 for i in range(80)]


def observed(batches: list[Tensor]) -> ChannelObserver:
    observer = ChannelObserver()
    for batch in batches:
        observer.see_extremes(batch)
    for batch in batches:
        observer.see_values(batch)
    return observer


def sample(seed: int, rows: int = 300) -> Tensor:
    """Give channels that are narrow, wide, shifted, one-sided, negative and tailed."""
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return torch.stack([x[:, 0] * 0.01, x[:, 1] * 50, x[:, 2] + 7, x[:, 3].relu(), -x[:, 4].abs() - 1, x[:, 5] ** 5], 1)


def plain_search(centers: np.ndarray, counts: np.ndarray, low: float, high: float, bits: int) -> tuple[float, float]:
    """Give scale and zero point of one channel by trying every share of its range."""
    best, found = np.inf, (np.nan, np.nan)
    for share in SHARES:
        scale = (max(high * share, 0) - min(low * share, 0)) / (2**bits - 1)
        zero_point = np.clip(np.round(-min(low * share, 0) / scale), 0, 2**bits - 1)
        codes = np.clip(np.round(centers / scale) + zero_point, 0, 2**bits - 1)
        error = (np.abs((codes - zero_point) * scale - centers) ** 2.4 * counts).sum()
        if error < best:
            best, found = error, (scale, zero_point)
    return found


@pytest.mark.parametrize("shape", [(300, 6), (3, 100, 6), (3, 4, 25, 6)])
def test_extremes_are_those_of_every_last_axis_entry(shape: tuple[int, ...]) -> None:
    x = sample(0)
    observer = observed([x.reshape(shape)])
    assert np.array_equal(observer.low.numpy(), x.numpy().min(0))
    assert np.array_equal(observer.high.numpy(), x.numpy().max(0))


def test_histogram_is_numpys() -> None:
    """Widths are powers of two and values lie inside of bins, so both divide exactly."""
    inside = torch.randint(BINS, (500, 4), generator=torch.Generator().manual_seed(1)) + 0.5
    steps = torch.cat([inside, torch.zeros(1, 4), torch.full((1, 4), float(BINS))])
    x = steps * torch.tensor([0.25, 1.0, 2.0, 8.0]) + torch.tensor([0.0, -64.0, 256.0, -2048.0])
    observer = observed([x])
    assert observer.histogram.dtype == torch.float64
    for channel in range(4):
        values = x[:, channel].double().numpy()
        counts, edges = np.histogram(values, BINS, (values.min(), values.max()))
        assert np.array_equal(observer.histogram[channel].numpy(), counts)
        assert np.allclose(observer.centers()[channel].numpy(), (edges[1:] + edges[:-1]) / 2)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 299), max_size=5, unique=True))
@settings(max_examples=30)
def test_batches_merge(seed: int, cuts: list[int]) -> None:
    x = sample(seed)
    whole, split = observed([x]), observed(list(torch.tensor_split(x.flip(0), sorted(cuts))))
    assert torch.equal(torch.stack([whole.low, whole.high]), torch.stack([split.low, split.high]))
    assert torch.equal(whole.histogram, split.histogram)
    assert whole.histogram.sum(1).eq(len(x)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_affine_is_a_plain_search_in_every_channel(bits: int, seed: int) -> None:
    observer = observed([sample(seed), sample(seed + 100)])
    scale, zero_point = observer.affine(bits)
    assert scale.dtype == zero_point.dtype == torch.float64
    for channel, (centers, counts) in enumerate(zip(observer.centers(), observer.histogram, strict=True)):
        low, high = observer.low[channel].item(), observer.high[channel].item()
        expected = plain_search(centers.numpy(), counts.numpy(), low, high, bits)
        assert (scale[channel].item(), zero_point[channel].item()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_affine_is_as_good_as_a_search_on_the_values(bits: int) -> None:
    """It knows bins only; what they hide is little beside a code's width."""
    x = sample(5, 3000).double()

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = code_limits(bits, signed=False)
        return (fake_quantize(x, scale, zero_point, codes) - x).abs().pow(2.4).sum(0)

    candidates = [affine_parameters(x.amin(0) * share, x.amax(0) * share, bits, symmetric=False) for share in SHARES]
    best = torch.stack([error(*candidate) for candidate in candidates]).amin(0)
    assert (error(*observed([x.float()]).affine(bits)) <= 1.02 * best).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_constant_channels_have_exact_codes_beside_others(bits: int) -> None:
    x = torch.cat([sample(6), torch.tensor([0.0, 5.0, -5.0, 1e-30]).expand(300, 4)], 1)
    observer = observed([x[:100], x[100:]])
    scale, zero_point = observer.affine(bits)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert torch.equal(zero_point, zero_point.round().clamp(0, 2**bits - 1))
    kept = fake_quantize(x.double(), scale, zero_point, code_limits(bits, signed=False))
    assert torch.allclose(kept[:, 6:], x[:, 6:].double(), rtol=1e-6, atol=0)
    assert torch.equal(observer.histogram[6:].sum(1), torch.full((4,), 300.0, dtype=torch.float64))
    others = observed([x[:, :6]]).affine(bits)
    assert torch.equal(scale[:6], others[0])
    assert torch.equal(zero_point[:6], others[1])
