"""Quantized layers of all kinds: off they are the wrapped layer, on they compute with quantized operands."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.quant.layers import QUANTIZABLE, QuantizedLayer
from pack_ptq.quant.quantizers import ActivationQuantizer, WeightMode
from pack_ptq.types import QuantizerSpec

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 8, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
    "linear-3d": (lambda: nn.Linear(5, 3), (2, 7, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed-grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (2, 2, 3, 3, 3)),
}


def quantized_layer(kind: str, symmetric: bool = False) -> tuple[QuantizedLayer, Tensor]:
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    layer, x = QuantizedLayer(build(), ActivationQuantizer()), torch.randn(shape)
    for watching in ("extremes", "values", None):
        layer.input_quantizer.watching = watching
        layer(x)
    layer.weight_quantizer.set_range(layer.weight, QuantizerSpec(4), symmetric)
    layer.input_quantizer.set_range(QuantizerSpec(4, per_channel=False))
    return layer, x


def test_every_quantizable_kind_is_tested() -> None:
    assert {type(build()) for build, _ in KINDS.values()} == set(QUANTIZABLE)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_wrapped_layer(kind: str) -> None:
    layer, x = quantized_layer(kind)
    assert torch.equal(layer(x), layer.layer(x))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_on_is_the_layer_with_torchs_fake_quantized_operands(kind: str, symmetric: bool) -> None:
    layer, x = quantized_layer(kind, symmetric)
    layer.weight_quantizer.mode, layer.input_quantizer.enabled = "nearest", True
    axis = 1 if "transposed" in kind else 0
    weight_quantizer, input_quantizer = layer.weight_quantizer, layer.input_quantizer
    weight = torch.fake_quantize_per_channel_affine(
        layer.weight, weight_quantizer.scale.flatten(), weight_quantizer.zero_point.flatten().int(), axis,
        *weight_quantizer.limits,
    )  # fmt: skip
    inputs = torch.fake_quantize_per_tensor_affine(
        x, input_quantizer.scale.detach(), input_quantizer.zero_point.int(), 0, 15
    )
    before = layer.weight.clone()
    y = layer(x)
    assert torch.equal(layer.weight, before)
    layer.layer.weight.data = weight.detach()
    assert torch.allclose(y, layer.layer(inputs), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_deploy_bias_is_int32_steps_of_each_channel(kind: str) -> None:
    layer, x = quantized_layer(kind, symmetric=True)
    layer.integer_bias = True
    bias = layer.rounded_bias(layer.bias)
    assert bias.shape == layer.bias.shape
    scales = layer.weight_quantizer.scale.flatten()
    steps = scales.repeat(len(bias) // len(scales)) * layer.input_quantizer.scale.detach()
    codes = bias / steps
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert ((bias - layer.bias).abs() <= steps * 0.5001).all()

    layer.weight_quantizer.mode, layer.input_quantizer.enabled = "nearest", True
    rounded = layer(x)
    layer.integer_bias = False
    kept = layer(x)
    shape = [1, -1] + [1] * (x.ndim - 2) if not kind.startswith("linear") else [-1]
    assert torch.allclose(rounded - kept, (bias - layer.bias).reshape(shape).expand_as(kept), atol=1e-5)


def test_deploy_integer_arithmetic_gives_the_same_output() -> None:
    """A runtime adds integers: codes times codes plus the int32 bias, times s_x s_w."""
    layer, x = quantized_layer("linear", symmetric=True)
    layer.integer_bias = True
    layer.weight_quantizer.mode, layer.input_quantizer.enabled = "nearest", True
    step_x, zero_x = layer.input_quantizer.scale.detach(), layer.input_quantizer.zero_point
    codes_x = (torch.round(x / step_x) + zero_x).clamp(0, 15).long()
    codes_w = layer.weight_quantizer.nearest_codes(layer.weight).long()
    step = step_x * layer.weight_quantizer.scale.flatten()
    total = (
        F.linear((codes_x - zero_x.long()).double(), codes_w.double()).long() + torch.round(layer.bias / step).long()
    )
    assert torch.allclose(layer(x), (total * step.double()).float(), atol=1e-5)


def test_bias_stays_real_where_the_input_is_not_quantized() -> None:
    layer, x = quantized_layer("conv2d", symmetric=True)
    layer.weight_quantizer.mode = "nearest"
    expected = layer(x)
    layer.integer_bias = True
    assert torch.equal(layer(x), expected)
    layer.input_quantizer.enabled = True
    layer.input_quantizer.set_range(None)
    assert torch.equal(layer(x), expected)


def test_bias_beyond_int32_is_clipped() -> None:
    layer, _ = quantized_layer("linear", symmetric=True)
    layer.layer.bias.data.fill_(1e30)
    step = layer.weight_quantizer.scale.flatten() * layer.input_quantizer.scale.detach()
    assert torch.allclose(layer.rounded_bias(layer.bias), 2**31 * step, rtol=1e-5)


def test_layer_without_bias() -> None:
    layer = QuantizedLayer(nn.Conv2d(3, 4, 1, bias=False), ActivationQuantizer())
    layer.weight_quantizer.set_range(layer.weight, QuantizerSpec(2), symmetric=True)
    layer.weight_quantizer.mode, layer.integer_bias, layer.input_quantizer.enabled = "nearest", True, True
    assert layer.bias is None
    assert layer(torch.randn(1, 3, 2, 2)).shape == (1, 4, 2, 2)


def noisy_layer(bias: bool = True, symmetric: bool = False) -> tuple[QuantizedLayer, Tensor]:
    layer, x = quantized_layer("linear-3d", symmetric)
    layer.layer.bias = layer.layer.bias if bias else None
    layer.noise = layer.input_quantizer.scale.detach() * torch.tensor([0.3, -0.9, 0.0, 1.7, -0.4])
    return layer, x


@pytest.mark.parametrize("weights", ["off", "nearest"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_noise_is_taken_out_exactly(bias: bool, weights: WeightMode) -> None:
    layer, x = noisy_layer(bias)
    assert torch.equal(layer(x), layer.layer(x)), "inputs that are not quantized get none"
    layer.weight_quantizer.mode, layer.input_quantizer.enabled = weights, True
    layer.input_quantizer.drop = 1.0  # every element stays as it is, with the noise
    weight = layer.weight_quantizer(layer.weight)
    assert torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-5)
    layer.trial = weight + 1
    assert torch.allclose(layer(x), F.linear(x, weight + 1, layer.bias), atol=1e-5)


@torch.no_grad()
def test_noise_by_hand() -> None:
    """What is quantized is the noisy input; what is left of the noise is only its effect on the rounding."""
    layer, x = noisy_layer()
    layer.weight_quantizer.mode, layer.input_quantizer.enabled = "nearest", True
    layer.correction = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
    assert layer.noise is not None
    q, weight = layer.input_quantizer, layer.weight_quantizer(layer.weight)
    rounded = torch.fake_quantize_per_tensor_affine(x + layer.noise, q.scale.item(), int(q.zero_point), 0, 15)
    expected = F.linear(rounded - layer.noise, weight, layer.bias + layer.correction)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.noise = None
    assert not torch.allclose(layer(x), expected, atol=1e-3)


@torch.no_grad()
def test_integer_arithmetic_with_noise_gives_the_same_output() -> None:
    """A runtime adds the noise before it quantizes, and holds the bias without it in int32."""
    layer, x = noisy_layer(symmetric=True)
    layer.integer_bias = True
    layer.weight_quantizer.mode, layer.input_quantizer.enabled = "nearest", True
    assert layer.noise is not None
    step_x, zero_x = layer.input_quantizer.scale.detach(), layer.input_quantizer.zero_point
    codes_x = (torch.round((x + layer.noise) / step_x) + zero_x).clamp(0, 15).long()
    codes_w = layer.weight_quantizer.nearest_codes(layer.weight).long()
    step = step_x * layer.weight_quantizer.scale.flatten()
    bias = layer.bias - (codes_w * layer.weight_quantizer.scale) @ layer.noise
    total = F.linear((codes_x - zero_x.long()).double(), codes_w.double()).long() + torch.round(bias / step).long()
    assert torch.allclose(layer(x), (total * step.double()).float(), atol=1e-5)


def test_noise_passes_gradients_on() -> None:
    layer, x = noisy_layer()
    layer.weight_quantizer.begin_fit(layer.weight, learn_scale=True)
    layer.input_quantizer.enabled = True
    layer.input_quantizer.drop = 1.0
    layer(x).square().sum().backward()
    found = layer.weight_quantizer.rounding.grad  # type: ignore[union-attr]
    layer.weight_quantizer.rounding.grad = layer.noise = None  # type: ignore[union-attr]
    layer(x).square().sum().backward()
    assert torch.allclose(found, layer.weight_quantizer.rounding.grad, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
