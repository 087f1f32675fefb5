"""AIQViT's dynamic focusing quantizer (arXiv 2502.04628; METHOD A3): uniform codes on a window `[b1, b2]` of `x >= 0`.

`q = round(clip((x - b1) / s, 0, 2^bits - 1))` stands for `b1 + s q`, with `s = (b2 - b1) / (2^bits - 1)`. Beside a
plain quantizer this is one more constant per tensor, so a product with integer codes stays one integer product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pack_ptq.quant.affine import code_limits

SPREAD = 24  # candidates for a bound that are spread geometrically
SHARES = 16  # and those that are spread by quantiles
ZOOMS = 3
ZOOM = 4  # by which each zoom narrows the search


def focusing_codes(x: Tensor, lower: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Give the codes of `x` as floats: integers from 0 to `2^bits - 1`."""
    return ((x - lower) / scale).clamp_(*code_limits(bits, signed=False)).round_()


def focusing_quantize(x: Tensor, lower: Tensor, scale: Tensor, bits: int, kept: Tensor | None = None) -> Tensor:
    """Quantize and dequantize, straight through the rounding.

    Inside the window the output is `x + s r` with a rounding error `r` that is held fixed; below it is `b1`, above it
    `b1 + s (2^bits - 1)`. The gradients for `x`, `b1` and `s` are those of these three forms.

    Args:
        x: Any shape.
        lower: `b1`, a scalar, at least 0.
        scale: `s`, a scalar, positive.
        bits: 2 to 8.
        kept: Zeros and ones in the shape and type of `x`; elements with 1 stay as they are (QDrop, arXiv 2203.05740).

    Returns:
        `b1 + s q` in the shape of `x`.
    """
    if kept is None and not torch.is_grad_enabled():
        return focusing_codes(x, lower, scale, bits).mul_(scale).add_(lower)
    return FocusingQuantize.apply(x, lower, scale, bits, kept)


class FocusingQuantize(torch.autograd.Function):
    """The gradients of `focusing_quantize`, with few temporaries: attention probabilities are the largest tensors."""

    @staticmethod
    def forward(  # noqa: D102
        ctx, x: Tensor, lower: Tensor, scale: Tensor, bits: int, kept: Tensor | None = None
    ) -> Tensor:  # type: ignore[override]
        steps = (x - lower).div_(scale)
        clipped = steps.clamp(*code_limits(bits, signed=False))
        passed = steps.eq_(clipped)
        codes = clipped.round()
        slope = None
        if ctx.needs_input_grad[2]:
            # Inside the window the rounding error in steps, outside the code of the end that was reached.
            slope = clipped.mul_(passed).neg_().add_(codes)
        output = codes.mul_(scale).add_(lower)
        if kept is not None:
            output = output.lerp_(x, kept)
            torch.maximum(passed, kept, out=passed)
            slope = slope if slope is None else slope.addcmul_(slope, kept, value=-1)
        ctx.save_for_backward(passed if any(ctx.needs_input_grad[:2]) else None, slope)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:  # type: ignore[override]  # noqa: D102
        passed, slope = ctx.saved_tensors
        grad_x = grad * passed if passed is not None else None
        # What is not passed to x moves with the lower end, on both sides of the window.
        grad_lower = (grad - grad_x).sum() if grad_x is not None and ctx.needs_input_grad[1] else None
        grad_scale = (grad * slope).sum() if slope is not None else None
        return grad_x if ctx.needs_input_grad[0] else None, grad_lower, grad_scale, None, None


def focusing_bounds(centers: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Search the window with the smallest squared error on a histogram; AIQViT does not say how it starts.

    A grid over both ends, 0 among them, is followed by finer grids around the best pair.

    Args:
        centers: Centers of the bins, ascending, shape (bins,), float64; the bins need not be equally wide.
        weights: Counts of the bins, shape (bins,), float64.
        bits: 2 to 8.

    Returns:
        `b1` (at least 0) and `s` (positive), scalars in float32. The window is [0, 1] if no value is above 0.
    """
    held = weights > 0
    centers, weights = centers[held], weights[held]
    steps = code_limits(bits, signed=False)[1]
    if not len(centers) or centers[-1] <= 0:
        ends = centers.new_tensor([0, 1])
    elif len(centers) == 1:
        ends = F.pad(centers, (1, 0))
    else:
        ends = _search(centers, weights, steps)
    # Subnormal scales would overflow in the division by them.
    scale = ((ends[1] - ends[0]) / steps).float().clamp(min=torch.finfo(torch.float32).tiny)
    return ends[0].float(), scale


def _search(centers: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Give both ends, shape (2,), for at least two bins with weight, the last one above 0."""
    moments = F.pad(torch.stack([weights, weights * centers, weights * centers**2]).cumsum(1), (1, 0))
    narrowest = torch.minimum(centers.diff().min(), centers[-1]) / 2
    points, ratio = _candidates(centers, weights)
    lowers, uppers = points, points
    for zoom in range(ZOOMS + 1):
        pairs = torch.cartesian_prod(lowers, uppers)
        pairs = pairs[pairs[:, 1] - pairs[:, 0] > narrowest]
        best = pairs[_errors(centers, moments, pairs, steps).argmin()]
        factors = (torch.linspace(-1, 1, 2 * ZOOM + 1).to(centers) * ratio.log() / ZOOM**zoom).exp()
        lowers, uppers = (best[0] * factors).unique(), best[1] * factors
    return best


def _candidates(centers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Give candidates for either end, ascending from 0, and the ratio between those that are spread geometrically."""
    first, last = centers[centers > 0][0], centers[-1]
    exponents = torch.linspace(0, 1, SPREAD).to(centers)
    # Softmax outputs crowd at 1 / tokens, of which quantiles take care, and have a thin tail up to 1.
    shares = weights.cumsum(0) / weights.sum()
    quantiles = centers[torch.searchsorted(shares, torch.linspace(0, 1, SHARES).to(shares)).clamp_(max=len(shares) - 1)]
    points = torch.cat([first.new_zeros(1), first * (last / first) ** exponents, quantiles, last[None]])
    return points.clamp(min=0).unique(), (last / first) ** exponents[1]


def _errors(centers: Tensor, moments: Tensor, pairs: Tensor, steps: int) -> Tensor:
    """Give the squared error of each window, shape (pairs,).

    Args:
        centers: Shape (bins,).
        moments: Sums of the weights, of the values and of their squares over the first bins, shape (3, bins + 1).
        pairs: Lower and upper ends, shape (pairs, 2).
        steps: The largest code.
    """
    scale = (pairs[:, 1:] - pairs[:, :1]) / steps
    values = pairs[:, :1] + scale * torch.arange(steps + 1).to(centers)
    ends = torch.searchsorted(centers, values[:, :-1] + scale / 2)
    ends = F.pad(F.pad(ends, (1, 0)), (0, 1), value=len(centers))
    count, total, squares = moments[:, ends].diff()
    return (squares - 2 * values * total + values**2 * count).sum(1)
