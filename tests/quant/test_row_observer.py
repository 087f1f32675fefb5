"""Codes beside the largest of each row: a plain search and the product that a runtime computes are the oracles."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.quant.row_observer import BINS, RowObserver, row_shares
from pack_ptq.types import QuantizerSpec


def probabilities(seed: int, rows: int = 60, columns: int = 50) -> Tensor:
    """Give softmax outputs, some rows flat and some with one large value."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.1, 8, rows)[:, None]
    return torch.softmax(sharpness * torch.randn(rows, columns, generator=generator), -1)


def quantizer_of(p: Tensor, bits: int, axis: int = -1) -> ActivationQuantizer:
    quantizer = ActivationQuantizer()
    quantizer.rows = RowObserver(axis)
    for watching in ("extremes", "values", None):
        quantizer.watching = watching
        quantizer(p)
    quantizer.set_range(QuantizerSpec(bits, per_channel=False), "row_scaled")
    quantizer.enabled = True
    return quantizer


@pytest.mark.parametrize("axis", [-1, -2])
def test_shares_are_of_the_largest_along_the_axis_and_rows_of_zeros_stay(axis: int) -> None:
    x = probabilities(0).reshape(3, 20, 50)
    x[1, 4], x[:, :, 7] = 0, 0
    shares, largest = row_shares(x, axis)
    expected = x.numpy().max(axis, keepdims=True)
    assert np.array_equal(largest.numpy(), expected)
    assert np.allclose(shares.numpy(), x.numpy() / np.where(expected > 0, expected, 1))


def test_the_histogram_counts_each_share_by_the_square_of_its_largest_value_over_all_batches() -> None:
    p = probabilities(1)
    observer = RowObserver(-1)
    for batch in p.split(25):
        observer.see_values(batch)
    shares, largest = (x.double().numpy() for x in row_shares(p, -1))
    expected, _ = np.histogram(shares, BINS, (0, 1), weights=np.broadcast_to(largest**2, shares.shape))
    assert observer.histogram.numpy().sum() == pytest.approx(expected.sum())
    # a share on an edge may fall to either side, in single and double precision
    assert np.abs(observer.histogram.numpy().cumsum() - expected.cumsum()).max() <= 2 * (largest**2).max()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_scale_has_the_smallest_error_on_the_values_themselves(bits: int, seed: int) -> None:
    p = probabilities(seed)
    largest = p.amax(-1, keepdim=True)
    most = 2**bits - 1

    def error(scale: float) -> float:
        return ((p / largest / scale).round().clamp(0, most) * scale * largest - p).square().sum().item()

    found = quantizer_of(p, bits).scale.item()
    assert 0 < found <= (1 + 1e-6) / most
    best = min(error((1 - i / 100) / most) for i in range(80))
    assert error(found) <= 1.02 * best, "the histogram's bins cost no more than that"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_product_is_that_of_integer_codes_times_one_factor_a_row(bits: int) -> None:
    p, value = probabilities(2), torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    quantizer = quantizer_of(p, bits)
    scale = quantizer.scale.item()
    codes = (p / p.amax(-1, keepdim=True) / scale).round().clamp(0, 2**bits - 1)
    assert len(codes.unique()) <= 2**bits
    expected = (codes.to(torch.int32).to(torch.float64) @ value.double()) * scale * p.amax(-1, keepdim=True).double()
    assert torch.allclose((quantizer(p) @ value).double(), expected, atol=1e-5)


def test_along_the_axis_that_the_right_operand_is_summed_over_the_factor_is_one_a_column() -> None:
    p, left = probabilities(4), torch.randn(6, 60, generator=torch.Generator().manual_seed(3))
    quantizer = quantizer_of(p, 4, axis=-2)
    largest = p.amax(-2, keepdim=True)
    codes = (p / largest / quantizer.scale).round().clamp(0, 15)
    assert torch.allclose(left @ quantizer(p), (left @ codes) * quantizer.scale * largest, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_of_unlike_size_keep_more_than_with_one_range_for_all(bits: int) -> None:
    p = probabilities(5)
    rows = quantizer_of(p, bits)
    focusing = quantizer_of(p, bits)
    focusing.set_range(QuantizerSpec(bits, per_channel=False), "focusing")
    flat = slice(0, 20)
    assert (rows(p) - p)[flat].square().mean() < 0.5 * (focusing(p) - p)[flat].square().mean()


def test_gradients_pass_and_reach_the_scale() -> None:
    p = probabilities(6).requires_grad_()
    quantizer = quantizer_of(p.detach(), 4)
    quantizer.learn(True)
    quantizer(p).square().sum().backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()
    assert quantizer.scale.grad.abs() > 0
    assert quantizer.variables == [quantizer.scale]


def test_elements_that_are_dropped_stay_as_they_are() -> None:
    p = probabilities(7)
    quantizer = quantizer_of(p, 2)
    quantizer.drop, quantizer.generator = 1.0, torch.Generator().manual_seed(0)
    assert torch.allclose(quantizer(p), p, atol=1e-7)


def test_without_a_known_axis_focusing_stands_in() -> None:
    p = probabilities(8)
    quantizer = ActivationQuantizer()
    for watching in ("extremes", "values", None):
        quantizer.watching = watching
        quantizer(p)
    quantizer.set_range(QuantizerSpec(3, per_channel=False), "row_scaled")
    assert quantizer.kind == "focusing"
