"""RepQ-ViT's log-sqrt2 quantizer for softmax outputs (arXiv 2212.08254), for comparisons only.

`q = clip(round(-2 log2((x - shift) / s)), 0, 2^bits - 1)` stands for `s 2^(-q/2) + shift`. Simulated only: products
with such codes are no integer products, so no integer runtime takes them.

The largest code stands for 0, that is for `shift`. RepQ-ViT's own code also gives 0 to what is too small for the
largest code, but has a value for that code besides; its `2^bits + 1` values do not fit into `bits` bits.
"""

import torch
from torch import Tensor

from pack_ptq.quant.affine import code_limits

PER_OCTAVE = 16  # candidates for the scale between one value and its double
OCTAVES = 12
LARGEST_RATIO = 2**0.25  # of (x - shift) / s: beyond it the code would be rounded to less than 0


def log_sqrt2_codes(x: Tensor, scale: Tensor, bits: int, shift: Tensor | float = 0.0) -> Tensor:
    """Give the codes of `x` as floats, from 0 (the largest value) to `2^bits - 1` (`x <= shift` and what is near)."""
    ratio = ((x - shift) / scale).clamp_(min=0)
    return ratio.log2_().mul_(-2).round_().clamp_(*code_limits(bits, signed=False))


def log_sqrt2_dequantize(codes: Tensor, scale: Tensor, bits: int, shift: Tensor | float = 0.0) -> Tensor:
    """Give the real values that codes stand for: `s 2^(-q/2) + shift`, and `shift` for the largest code."""
    return _units(codes, bits).mul_(scale).add_(shift)


def log_sqrt2_quantize(
    x: Tensor, scale: Tensor, bits: int, shift: Tensor | float = 0.0, kept: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize, straight through the rounding, with a gradient for the scale.

    As in LSQ (arXiv 1902.08153, eq. 3) the slope for `x` is 1 unless it is clipped. With the slope 0 that would follow
    from the straight-through rounding of `q` the scale could not be learned; here it is what makes the output
    homogeneous in `x - shift` and `s`: the rounding error over `s`, which is LSQ's too, and 1 where `x` is too large.

    Args:
        x: Any shape.
        scale: `s`, a scalar, positive: the largest value less the shift.
        bits: 2 to 8.
        shift: The value of the largest code, a scalar; it gets no gradient.
        kept: Zeros and ones in the shape and type of `x`; elements with 1 stay as they are (QDrop, arXiv 2203.05740).

    Returns:
        Values in `[shift, shift + s]` in the shape of `x`; others only where `kept` is 1.
    """
    if kept is None and not torch.is_grad_enabled():
        return log_sqrt2_dequantize(log_sqrt2_codes(x, scale, bits, shift), scale, bits, shift)
    return LogSqrt2Quantize.apply(x, scale, bits, shift, kept)


class LogSqrt2Quantize(torch.autograd.Function):
    """The gradients of `log_sqrt2_quantize`."""

    @staticmethod
    def forward(  # noqa: D102
        ctx, x: Tensor, scale: Tensor, bits: int, shift: Tensor | float, kept: Tensor | None = None
    ) -> Tensor:  # type: ignore[override]
        ratio = (x - shift) / scale
        units = _units(log_sqrt2_codes(x, scale, bits, shift), bits)
        passed = ratio.ge(0).logical_and_(ratio.le(LARGEST_RATIO)).to(x.dtype)
        slope = units - ratio.mul_(passed)
        output = units.mul_(scale).add_(shift)
        if kept is not None:
            output = output.lerp_(x, kept)
            passed = torch.maximum(passed, kept)
            slope = slope.addcmul_(slope, kept, value=-1)
        ctx.save_for_backward(passed, slope)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]  # noqa: D102
        passed, slope = ctx.saved_tensors
        grad_x = grad * passed if ctx.needs_input_grad[0] else None
        return grad_x, (grad * slope).sum() if ctx.needs_input_grad[1] else None, None, None, None


@torch.no_grad()
def log_sqrt2_scale(centers: Tensor, weights: Tensor, bits: int, shift: Tensor | float = 0.0) -> Tensor:
    """Search the scale with the smallest squared error on a histogram; RepQ-ViT tries three percentiles.

    Args:
        centers: Centers of the bins, shape (bins,), float64.
        weights: Counts of the bins, shape (bins,), float64.
        bits: 2 to 8.
        shift: The value of the largest code, a scalar.

    Returns:
        The scale, a scalar in float32, positive; 1 if no value is above the shift.
    """
    centers = centers - shift
    held = (weights > 0) & (centers > torch.finfo(torch.float32).tiny * 2**OCTAVES)
    if not held.any():
        return torch.ones((), device=centers.device)
    centers, weights = centers[held], weights[held]
    octaves = torch.arange(-OCTAVES * PER_OCTAVE, PER_OCTAVE // 4 + 1).to(centers) / PER_OCTAVE
    scales = centers.max() * octaves.exp2()
    values = log_sqrt2_quantize(centers, scales[:, None], bits)
    return scales[((values - centers).square_() @ weights).argmin()].float()


def _units(codes: Tensor, bits: int) -> Tensor:
    """Give the values of codes in units of the scale."""
    return codes.mul(-0.5).exp2_().mul_(codes != code_limits(bits, signed=False)[1])
