"""Extra codes for outlying channels: the larger layer that they stand for is the oracle."""

import pytest
import torch
from torch import Tensor

from pack_ptq.quant.affine import LearnedStepQuantize
from pack_ptq.quant.channel_observer import ChannelObserver
from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.quant.split_channels import WORTH, search_split
from pack_ptq.types import QuantizerSpec

CHANNELS = 64


def sample(seed: int, outliers: dict[int, float], rows: int = 400) -> Tensor:
    """Give what follows a GELU, with values far out in a twentieth of the rows of some channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.gelu(torch.randn(rows, CHANNELS, generator=generator))
    for channel, size in outliers.items():
        x[::20, channel] = size * (1 + 0.05 * torch.rand(len(x[::20]), generator=generator))
    return x


def quantizer_of(x: Tensor, bits: int, most_copies: float) -> ActivationQuantizer:
    quantizer = ActivationQuantizer()
    quantizer.channels = ChannelObserver()
    for watching in ("extremes", "values", None):
        quantizer.watching = watching
        quantizer(x)
    quantizer.set_range(QuantizerSpec(bits, per_channel=False), "uniform", most_copies)
    quantizer.enabled = True
    return quantizer


def expanded(x: Tensor, quantizer: ActivationQuantizer, bits: int) -> tuple[Tensor, list[int]]:
    """Quantize with plain codes of `bits` bits only: each copy is the channel, shifted by a whole number of ranges."""
    assert quantizer.copies is not None
    most, scale, zero = 2**bits - 1, quantizer.scale.item(), quantizer.zero_point.item()
    values, columns = [], []
    for channel in range(x.shape[-1]):
        below, above = (int(n) for n in quantizer.copies[:, channel])
        steps = (x[..., channel] / scale).round()
        for j in range(-below, above + 1):
            # a copy below counts downwards from its top, so that it is 0 where the value lies above it
            offset = zero if j == 0 else most if j < 0 else 0
            codes = (steps + zero - j * most).clamp(0, most)
            assert codes.min() >= 0
            assert codes.max() <= most
            values.append(scale * (codes - offset))
            columns.append(channel)
    return torch.stack(values, -1), columns


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("outliers", [{5: 30.0}, {5: -30.0}, {5: 40.0, 9: -20.0, 33: 25.0}])
def test_a_layer_is_a_larger_one_with_plain_codes_and_repeated_columns(bits: int, outliers: dict[int, float]) -> None:
    x = sample(0, outliers)
    quantizer = quantizer_of(x, bits, most_copies=1.0)
    assert quantizer.copies is not None
    weight = torch.randn(7, CHANNELS, generator=torch.Generator().manual_seed(1))
    codes, columns = expanded(x, quantizer, bits)
    assert len(columns) == CHANNELS + int(quantizer.copies.sum()) == round(CHANNELS * quantizer.expansion)
    assert torch.allclose(codes @ weight[:, columns].T, quantizer(x) @ weight.T, atol=1e-3)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_error_falls_and_outlying_values_are_kept(bits: int) -> None:
    x = sample(1, {5: 40.0})
    plain, split = quantizer_of(x, bits, 0.0), quantizer_of(x, bits, 0.5)
    assert plain.copies is None
    assert (split(x) - x).abs().pow(2.4).mean() <= WORTH * (plain(x) - x).abs().pow(2.4).mean()
    assert (split(x) - x)[::20, 5].abs().max() <= split.scale


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_no_more_copies_than_allowed(share: float) -> None:
    x = sample(2, {5: 40.0, 9: -20.0, 33: 25.0})
    quantizer = quantizer_of(x, 4, share)
    assert quantizer.copies is None or quantizer.copies.sum() <= share * CHANNELS


def test_channels_alike_are_not_split() -> None:
    assert quantizer_of(sample(3, {}), 4, 0.5).copies is None


@pytest.mark.parametrize("x", [torch.zeros(20, CHANNELS), -torch.rand(20, CHANNELS), torch.ones(20, CHANNELS)])
def test_one_sided_and_constant_inputs_are_left(x: Tensor) -> None:
    quantizer = quantizer_of(x, 4, 0.5)
    assert quantizer.copies is None
    assert (quantizer(x) - x).abs().max() <= quantizer.scale


def test_too_few_copies_to_reach_an_outlier_are_none() -> None:
    observer = ChannelObserver()
    x = sample(4, {5: 1000.0})
    observer.see_extremes(x)
    observer.see_values(x)
    assert search_split(observer, 4, 0.01) is None


def test_another_width_or_share_forgets_the_copies() -> None:
    x = sample(5, {5: 40.0})
    quantizer = quantizer_of(x, 4, 0.5)
    assert quantizer.copies is not None
    quantizer.set_range(QuantizerSpec(4, per_channel=False), "uniform", 0.0)
    assert quantizer.copies is None
    assert quantizer.expansion == 1


def test_gradients_stop_only_where_all_copies_end() -> None:
    x = sample(6, {5: 40.0}).requires_grad_()
    quantizer = quantizer_of(x.detach(), 4, 0.5)
    quantizer.learn(True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert (x.grad[::20, 5] == 1).all()
    assert quantizer.scale.grad.isfinite()


def test_limits_of_every_channel_alike_are_limits_of_all() -> None:
    x, scale, zero = sample(7, {}), torch.tensor(0.2), torch.tensor(1.0)
    limits = torch.zeros(CHANNELS), torch.full((CHANNELS,), 7.0)
    assert torch.equal(
        LearnedStepQuantize.apply(x, scale, zero, limits), LearnedStepQuantize.apply(x, scale, zero, (0, 7))
    )
