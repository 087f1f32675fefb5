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
    is run for every activation in every step of a fit.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx, x: Tensor, scale: Tensor, zero_point: Tensor, limits: Limits, kept: Tensor | None = None
    ) -> Tensor:  # type: ignore[override]
        steps = x / scale
        codes = torch.round(steps).add_(zero_point)
        shifted = codes.clone()
        codes.clamp_(*limits)
        outside = shifted.sub_(codes).abs_().clamp_(max=1)
        codes.sub_(zero_point)
        slope = None
        if ctx.needs_input_grad[1]:
            # Inside the range round(x/s) - x/s, outside the code of the end that was reached.
            slope = steps.mul_(outside.neg().add_(1)).neg_().add_(codes)
        output = codes.mul_(scale)
        if kept is not None:
            output = output.lerp_(x, kept)
            dropped = 1 - kept
            outside.mul_(dropped)
            slope = slope if slope is None else slope.mul_(dropped)
        passed = outside.neg_().add_(1)
        ctx.save_for_backward(passed if ctx.needs_input_grad[0] else None, slope)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]  # noqa: D102
        passed, slope = ctx.saved_tensors
        grad_scale = (grad * slope).sum() if slope is not None else None
        return grad * passed if passed is not None else None, grad_scale, None, None, None
