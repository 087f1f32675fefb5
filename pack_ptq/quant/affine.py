"""Uniform affine quantization: real values to integer codes and back."""

import torch
from torch import Tensor

Limits = tuple[int, int] | tuple[Tensor, Tensor]  # the smallest and largest code, of all or of every channel


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Give the smallest and largest code: two's complement if `signed`, else from 0."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def affine_parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Give scale and zero point for ranges, which are widened to hold 0.

    Args:
        low: Lower ends, any shape.
        high: Upper ends, the same shape.
        bits: 2 to 8.
        symmetric: Signed codes with zero point 0, else unsigned codes with an integer zero point.

    Returns:
        Scale (positive; 1 where the range is empty) and zero point (integers stored as floats), in the shape of `low`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    smallest, largest = code_limits(bits, signed=symmetric)
    scale = torch.maximum(-low / -smallest, high / largest) if symmetric else (high - low) / largest
    # Subnormal scales would overflow in the division by them.
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round().clamp(smallest, largest)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, limits: Limits) -> Tensor:
    """Give the nearest codes of `x` as floats: `clip(round(x / s) + z)`."""
    return (torch.round(x / scale) + zero_point).clamp(*limits)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Give the real values that codes stand for: `s (q - z)`."""
    return (codes - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, limits: Limits) -> Tensor:
    """Quantize and dequantize at once, without a useful gradient."""
    if torch.is_grad_enabled():
        return dequantize(quantize(x, scale, zero_point, limits), scale, zero_point)
    # The same steps in place: this is most of what a quantized forward costs beside its layers.
    return (x / scale).round_().add_(zero_point).clamp_(*limits).sub_(zero_point).mul_(scale)


class LearnedStepQuantize(torch.autograd.Function):
    """Fake quantization per tensor with LSQ's gradient for the scale (arXiv 1902.08153, eq. 3), without its rescaling.

    Adam is blind to a constant factor on a gradient, so LSQ's `1 / sqrt(N Q_p)` would change nothing. Elements where
    `kept` is 1 go through as they are (QDrop, arXiv 2203.05740). Masks are floats and steps are in place, since this
    is run for every activation in every step of a fit; few passes over the memory make most of its speed.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx, x: Tensor, scale: Tensor, zero_point: Tensor, limits: Limits, kept: Tensor | None = None
    ) -> Tensor:  # type: ignore[override]
        codes = (x / scale).round_().add_(zero_point)
        output = codes.clamp(*limits)
        passed = torch.eq(codes, output, out=codes)
        output.sub_(zero_point).mul_(scale)
        if kept is not None:
            output.lerp_(x, kept)
            torch.maximum(passed, kept, out=passed)
        # The scale times LSQ's slope: round(x/s) - x/s inside the range, outside the code of the end that was reached.
        slope = output.addcmul(passed, x, value=-1) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(passed if ctx.needs_input_grad[0] else None, slope, scale)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]  # noqa: D102
        passed, slope, scale = ctx.saved_tensors
        grad_scale = (grad * slope).sum() / scale if slope is not None else None
        return grad * passed if passed is not None else None, grad_scale, None, None, None
