"""Ranges of activations: torch's observers, exact quantiles and brute force are the oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization import MinMaxObserver

from pack_ptq.quant import observers
from pack_ptq.quant.affine import affine_parameters, code_limits, fake_quantize
from pack_ptq.quant.observers import BINS, ActivationObserver
from pack_ptq.types import QuantizerSpec

KINDS = ["minmax", "percentile", "mse"]


def spec(observer: str, bits: int = 4, percentile: float = 99.0) -> QuantizerSpec:
    return QuantizerSpec(bits, observer, percentile, per_channel=False)


def observed(batches: list[torch.Tensor]) -> ActivationObserver:
    observer = ActivationObserver()
    for batch in batches:
        observer.see_extremes(batch)
    for batch in batches:
        observer.see_values(batch)
    return observer


def sample(seed: int, kind: str = "normal", count: int = 4000) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return {"normal": x, "relu": x.relu(), "shifted": x + 7, "negative": -x.abs() - 1, "tailed": x**5}[kind]


@given(st.integers(0, 2**31), st.lists(st.integers(1, 399), max_size=5), st.sampled_from(KINDS))
@settings(max_examples=30)
def test_range_does_not_depend_on_how_samples_are_split(seed: int, cuts: list[int], kind: str) -> None:
    x = sample(seed, count=400)
    pieces = list(torch.tensor_split(x, sorted(cuts)))
    whole, split = observed([x]).range(spec(kind)), observed(pieces).range(spec(kind))
    assert torch.equal(torch.stack(whole), torch.stack(split))
    assert torch.equal(torch.stack(whole), torch.stack(observed([x.flip(0).reshape(20, 2, 10)]).range(spec(kind))))


@pytest.mark.parametrize("data", ["normal", "relu", "shifted", "negative", "tailed"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_gives_torchs_parameters(data: str, bits: int) -> None:
    batches = [sample(seed, data) for seed in range(3)]
    oracle = MinMaxObserver(torch.quint8, torch.per_tensor_affine, quant_min=0, quant_max=2**bits - 1)
    for batch in batches:
        oracle(batch)
    scale, zero_point = affine_parameters(*observed(batches).range(spec("minmax", bits)), bits, symmetric=False)
    their_scale, their_zero_point = oracle.calculate_qparams()
    assert torch.allclose(scale, their_scale.squeeze())
    assert zero_point == their_zero_point.squeeze()


@pytest.mark.parametrize("data", ["normal", "relu", "shifted", "negative", "tailed"])
@pytest.mark.parametrize("percentile", [50.5, 90.0, 99.0, 99.9])
def test_percentile_is_the_exact_quantile_to_a_bin(data: str, percentile: float) -> None:
    x = sample(1, data, 20001)
    low, high = observed([x]).range(spec("percentile", percentile=percentile))
    tail = (1 - percentile / 100) / 2
    width = (x.max() - x.min()) / BINS
    nearest = {"low": x.quantile(tail, interpolation="lower"), "high": x.quantile(1 - tail, interpolation="higher")}
    assert nearest["low"] - 2 * width <= low <= x.quantile(tail, interpolation="higher") + 1e-6
    assert x.quantile(1 - tail, interpolation="lower") - 1e-6 <= high <= nearest["high"] + 2 * width
    share = ((x >= low) & (x <= high)).double().mean() * 100
    assert share >= percentile - 0.02


@pytest.mark.parametrize("data", ["normal", "relu", "tailed"])
def test_percentile_100_is_minmax(data: str) -> None:
    observer = observed([sample(3, data)])
    ours, extremes = observer.range(spec("percentile", percentile=100)), observer.range(spec("minmax"))
    assert torch.allclose(torch.stack(ours), torch.stack(extremes), rtol=1e-6)


def test_percentile_cuts_a_lone_outlier_and_keeps_a_spike() -> None:
    x = torch.cat([torch.zeros(99_999), torch.tensor([1000.0])])
    low, high = observed([x]).range(spec("percentile", percentile=99.9))
    assert low == 0
    assert 0 < high <= 1000 / BINS + 1e-6
    half = torch.cat([torch.full((10,), -1.0), torch.full((10,), 1.0)])
    assert [v.item() for v in observed([half]).range(spec("percentile", percentile=60))] == pytest.approx([-1, 1])


@pytest.mark.parametrize("data", ["normal", "relu", "shifted", "negative", "tailed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_mse_is_as_good_as_brute_force_on_the_values(data: str, bits: int) -> None:
    x = sample(5, data).double()
    limits = code_limits(bits, signed=False)

    def error(low: torch.Tensor, high: torch.Tensor) -> float:
        scale, zero_point = affine_parameters(low, high, bits, symmetric=False)
        return (fake_quantize(x, scale, zero_point, limits) - x).abs().pow(2.4).sum().item()

    best = min(error(x.min() * share, x.max() * share) for share in [1 - i / 100 for i in range(80)])
    low, high = observed([x.float()]).range(spec("mse", bits))
    assert error(low.double(), high.double()) <= best * 1.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(10),
        torch.full((10,), 5.0),
        torch.full((10,), -5.0),
        torch.tensor([3.0]),
        torch.zeros(0),
        torch.tensor([0, 1e-45]),
        torch.tensor([1.0, 1.0 + 2**-23]),
        torch.tensor([-3e38, 1.0]),
    ],
    ids=["zeros", "constant", "negative", "single", "empty", "subnormal", "adjacent", "huge"],
)
def test_degenerate_inputs_stay_safe(kind: str, x: torch.Tensor) -> None:
    for bits in (2, 8):
        low, high = observed([x, x]).range(spec(kind, bits))
        scale, zero_point = affine_parameters(low, high, bits, symmetric=False)
        y = fake_quantize(x, scale, zero_point, code_limits(bits, signed=False))
        assert scale > 0
        assert torch.isfinite(y).all()
        if x.numel() and x.min() == x.max():
            assert torch.allclose(y, x), "a constant has an exact code"


def test_never_asked_observer_has_an_empty_range() -> None:
    assert ActivationObserver().range(spec("mse")) == (0, 0)


def test_nan_stays_visible_in_the_extremes() -> None:
    observer = ActivationObserver()
    for batch in (torch.ones(3), torch.tensor([1.0, torch.nan]), torch.zeros(3)):
        observer.see_extremes(batch)
    assert torch.isnan(observer.low)
    assert torch.isnan(observer.high)


def test_histogram_counts_more_than_single_precision_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count in float32 stops at 2**24; a ReLU map of a large batch has more zeros than that."""
    counted = []
    histc = torch.histc
    monkeypatch.setattr(torch, "histc", lambda x, *args: counted.append(len(x)) or histc(x, *args))
    monkeypatch.setattr(observers, "MOST_COUNTED", 1000)
    observer = observed([torch.linspace(-1, 1, 2500)])
    assert counted == [1000, 1000, 500]
    assert observer.histogram.sum() == 2500


def test_histogram_counts_a_large_batch_exactly() -> None:
    x = torch.zeros(1).expand(2**24 + 4).clone()
    x[0] = 1
    observer = observed([x])
    assert observer.histogram[0] == 2**24 + 3
    assert observer.histogram.sum() == len(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_observed_too(dtype: torch.dtype) -> None:
    x = sample(2).to(dtype)
    for kind in KINDS:
        low, high = observed([x]).range(spec(kind))
        assert low.dtype == high.dtype == torch.float32
        assert x.min().float() - 1e-6 <= low < high <= x.max().float() + 1e-6
