"""What layers read on average: sums over batches, and what weights make of it, beside the layers themselves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pack_ptq.quant.input_mean import InputMean, mean_output
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.quantizers import ActivationQuantizer, WeightMode
from pack_ptq.types import QuantizerSpec

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (5, 4, 9, 7)),
    "dilated": (lambda: nn.Conv2d(4, 6, (1, 3), dilation=2), (5, 4, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (5, 4, 9, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (5, 2, 4, 4, 4)),
    "linear": (lambda: nn.Linear(5, 3), (5, 5)),
    "tokens": (lambda: nn.Linear(5, 3), (5, 7, 5)),
}


def case(kind: str) -> tuple[QuantizedLayer, Tensor]:
    """Give a layer with 2-bit weights that has seen its input in two batches."""
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    layer, x = QuantizedLayer(build(), ActivationQuantizer()), torch.randn(shape) + 2
    layer.input_quantizer.watching = "extremes"
    for batch in x.split(2):
        layer(batch)
    layer.input_quantizer.watching = None
    layer.input_mean = (layer.seen.total / layer.seen.count).float()
    layer.weight_quantizer.set_range(layer.weight, QuantizerSpec(2), symmetric=False)
    return layer, x


def outputs_by_channel(layer: QuantizedLayer, y: Tensor) -> Tensor:
    return y.flatten(0, -2) if isinstance(layer.layer, nn.Linear) else y.transpose(0, 1).flatten(1).T


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_batches_give_the_mean(kind: str) -> None:
    layer, x = case(kind)
    assert layer.input_mean is not None
    torch.testing.assert_close(layer.input_mean, outputs_by_channel(layer, x).mean(0))


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(4, 6, 3), (4, 9, 7)), (nn.Linear(5, 3), (5,))])
def test_single_samples_may_come_without_an_axis_for_them(layer: nn.Module, shape: tuple[int, ...]) -> None:
    seen, x = InputMean(layer), torch.randn(shape)
    seen.see(x)
    torch.testing.assert_close((seen.total / seen.count).float(), x.flatten(1).mean(1) if x.ndim > 1 else x)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_output_is_the_layer_on_its_mean_everywhere(kind: str) -> None:
    layer, x = case(kind)
    mean = torch.randn(KINDS[kind][1][-1 if isinstance(layer.layer, nn.Linear) else 1])
    constant = (mean if isinstance(layer.layer, nn.Linear) else mean.view(-1, *[1] * (x.ndim - 2))).expand(x.shape)
    assert layer.bias is not None
    expected = outputs_by_channel(layer, layer.layer(constant))[0] - layer.bias
    torch.testing.assert_close(mean_output(layer.layer, layer.weight, mean), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "tokens"])
def test_linear_layers_lose_nothing_on_average(kind: str) -> None:
    layer, x = case(kind)
    wanted = outputs_by_channel(layer, layer.layer(x)).mean(0)
    layer.weight_quantizer.mode = "nearest"
    plain = outputs_by_channel(layer, layer(x)).mean(0)
    layer.corrects_mean = True
    torch.testing.assert_close(outputs_by_channel(layer, layer(x)).mean(0), wanted, atol=1e-5, rtol=1e-4)
    assert (plain - wanted).abs().max() > 0.01, "there was something to correct"


@pytest.mark.parametrize("kind", ["conv2d", "depthwise"])
def test_convolutions_lose_little_on_average(kind: str) -> None:
    layer, _ = case(kind)
    x = torch.randn(5, 4, 40, 40) + 2
    wanted = outputs_by_channel(layer, layer.layer(x)).mean(0)
    layer.weight_quantizer.mode = "nearest"
    plain = (outputs_by_channel(layer, layer(x)).mean(0) - wanted).abs().max()
    layer.corrects_mean = True
    layer.input_mean = x.mean((0, 2, 3))
    assert (outputs_by_channel(layer, layer(x)).mean(0) - wanted).abs().max() < plain / 10


@pytest.mark.parametrize("mode", ["off", "hard"])
def test_full_precision_and_hard_codes_are_left_alone(mode: WeightMode) -> None:
    layer, x = case("depthwise")
    quantizer = layer.weight_quantizer
    quantizer.set_codes(quantizer.nearest_codes(layer.weight), quantizer.scale)
    quantizer.mode = mode
    plain = layer(x)
    layer.corrects_mean = True
    assert torch.equal(layer(x), plain)


def test_roundings_see_what_the_bias_takes_up() -> None:
    """An error of all roundings of a channel alike is nothing but a shift where its input is constant."""
    layer, _ = case("depthwise")
    layer.corrects_mean = True
    layer.input_mean = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer.weight_quantizer.begin_fit(layer.weight, learn_scale=True)
    x = layer.input_mean.view(1, 4, 1, 1).expand(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), layer.layer(x), atol=1e-5, rtol=1e-4)
    (layer(x) - layer.layer(x) + 1).square().sum().backward()
    rounding, factor = layer.weight_quantizer.rounding, layer.weight_quantizer.log_factor
    assert rounding is not None
    assert rounding.grad is not None
    assert factor is not None
    assert factor.grad is not None
    assert rounding.grad.abs().max() < 1e-3
    assert factor.grad.abs().max() < 1e-3


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3, bias=False)])
def test_transposed_layers_and_those_without_bias_compute_as_before(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 5, 5)
    quantized = QuantizedLayer(layer, ActivationQuantizer())
    quantized.weight_quantizer.set_range(quantized.weight, QuantizerSpec(2), symmetric=False)
    quantized.weight_quantizer.mode = "nearest"
    plain = quantized(x)
    quantized.corrects_mean, quantized.input_mean = True, torch.ones(4)
    assert torch.equal(quantized(x), plain)
