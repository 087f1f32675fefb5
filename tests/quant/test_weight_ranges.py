"""Ranges of weights: torch's per-channel observer, exact quantiles and a search channel by channel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao.quantization import PerChannelMinMaxObserver

from pack_ptq.quant.affine import affine_parameters, code_limits, fake_quantize
from pack_ptq.quant.ranges import shrink_factors, weight_range
from pack_ptq.types import QuantizerSpec

KINDS = ["minmax", "percentile", "mse"]


def rows_of(seed: int, channels: int = 6, elements: int = 45) -> torch.Tensor:
    x = torch.randn(channels, elements, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-3, 2, channels)[:, None]


def test_shares_run_from_1_to_021() -> None:
    factors = shrink_factors()
    assert len(factors) == 80
    assert factors[0] == 1
    assert factors[-1].item() == pytest.approx(0.21)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_gives_torchs_per_channel_parameters(symmetric: bool, bits: int) -> None:
    rows = rows_of(0)
    smallest, largest = code_limits(bits, symmetric)
    oracle = PerChannelMinMaxObserver(
        0, torch.qint8 if symmetric else torch.quint8, torch.per_channel_affine, quant_min=smallest, quant_max=largest
    )
    low, high = weight_range(rows, QuantizerSpec(bits, "minmax"), symmetric)
    oracle(rows)
    assert torch.equal(low.squeeze(1), oracle.min_val)
    assert torch.equal(high.squeeze(1), oracle.max_val)
    scale, zero_point = affine_parameters(low, high, bits, symmetric)
    if not symmetric:
        their_scale, their_zero_point = oracle.calculate_qparams()
        assert torch.allclose(scale.squeeze(1), their_scale)
        assert torch.equal(zero_point.squeeze(1), their_zero_point.float())
    else:  # torch's symmetric scale wastes the code -2^(b-1) also where the negative side is the longer one
        assert torch.equal(scale, torch.maximum(low.clamp(max=0) / smallest, high.clamp(min=0) / largest))


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans())
def test_mse_is_the_brute_force_optimum_of_each_channel(seed: int, bits: int, symmetric: bool) -> None:
    rows = rows_of(seed, 3, 20)
    low, high = weight_range(rows, QuantizerSpec(bits, "mse"), symmetric)

    def error(row: torch.Tensor, row_low: torch.Tensor, row_high: torch.Tensor) -> float:
        scale, zero_point = affine_parameters(row_low, row_high, bits, symmetric)
        return (fake_quantize(row, scale, zero_point, code_limits(bits, symmetric)) - row).abs().pow(2.4).sum().item()

    for row, row_low, row_high in zip(rows, low, high, strict=True):
        best = min(error(row, row.min() * f, row.max() * f) for f in shrink_factors())
        assert error(row, row_low, row_high) == pytest.approx(best, rel=1e-4, abs=1e-12)


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4]))
def test_mse_never_loses_to_minmax(seed: int, bits: int) -> None:
    rows = rows_of(seed)
    errors = {}
    for kind in ("mse", "minmax"):
        scale, zero_point = affine_parameters(*weight_range(rows, QuantizerSpec(bits, kind), False), bits, False)
        quantized = fake_quantize(rows, scale, zero_point, code_limits(bits, False))
        errors[kind] = (quantized - rows).abs().pow(2.4).sum(1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()


def test_percentile_is_the_quantile_of_each_row() -> None:
    rows = rows_of(4, 3, 201)
    low, high = weight_range(rows, QuantizerSpec(4, "percentile", 90.0), symmetric=False)
    for row, row_low, row_high in zip(rows, low, high, strict=True):
        assert torch.allclose(row_low, row.sort().values[10])
        assert torch.allclose(row_high, row.sort().values[190])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "rows",
    [torch.zeros(2, 5), torch.full((2, 5), 3.0), torch.full((2, 5), -3.0), torch.zeros(2, 0), torch.zeros(0, 4)],
    ids=["zeros", "constant", "negative", "no-elements", "no-channels"],
)
def test_constant_and_empty_channels_are_safe(kind: str, symmetric: bool, rows: torch.Tensor) -> None:
    low, high = weight_range(rows, QuantizerSpec(3, kind), symmetric)
    assert low.shape == high.shape == (len(rows), 1)
    scale, zero_point = affine_parameters(low, high, 3, symmetric)
    assert (scale > 0).all()
    quantized = fake_quantize(rows, scale, zero_point, code_limits(3, symmetric))
    assert torch.allclose(quantized, rows), "the only value of a channel has an exact code"


def test_a_dead_channel_does_not_touch_its_neighbours() -> None:
    rows = rows_of(6)
    alone = weight_range(rows, QuantizerSpec(), symmetric=False)
    rows = torch.cat([rows, torch.zeros(1, rows.shape[1])])
    together = weight_range(rows, QuantizerSpec(), symmetric=False)
    assert torch.equal(together[0][:-1], alone[0])
    assert torch.equal(together[1][:-1], alone[1])
