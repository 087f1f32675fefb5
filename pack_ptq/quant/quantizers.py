"""The two quantizers of a layer: one for its weight, one for its input."""

from typing import Literal

import torch
from torch import Tensor, nn

from pack_ptq.quant.affine import (
    LearnedStepQuantize,
    affine_parameters,
    code_limits,
    dequantize,
    fake_quantize,
    quantize,
)
from pack_ptq.quant.dropping import random_mask
from pack_ptq.quant.observers import ActivationObserver
from pack_ptq.quant.ranges import weight_range
from pack_ptq.quant.rounding import rounding_start, soft_rounding
from pack_ptq.types import QuantizerSpec

WeightMode = Literal["off", "nearest", "soft", "settled", "hard"]


class WeightQuantizer(nn.Module):
    """Weights as `s (q - z)`; the codes are rounded to nearest, softly (AdaRound), or held as hard integers.

    Args:
        channel_axis: Axis of the output channels in the weight.

    Attributes:
        mode: `off` hands the weight through; `soft` needs `begin_fit`, and so does `settled`,
            which computes with the codes the fit would give if it ended now; `hard` needs `set_codes`.
        rounding: AdaRound's `v` while fitting, in the shape of the weight.
        log_factor: Logarithm of what the learned scale is over the first one, while fitting or tuning;
            channels x 1 x 1 x ...
    """

    scale: Tensor
    zero_point: Tensor
    codes: Tensor | None

    def __init__(self, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.mode: WeightMode = "off"
        self.bits = 8
        self.signed = False
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1))
        self.register_buffer("codes", None)
        self.rounding: nn.Parameter | None = None
        self.log_factor: nn.Parameter | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return code_limits(self.bits, self.signed)

    def set_range(self, weight: Tensor, spec: QuantizerSpec, symmetric: bool) -> None:
        """Choose scale and zero point for `weight`, per output channel or for the whole tensor."""
        self.bits, self.signed = spec.bits, symmetric
        channels = weight.shape[self.channel_axis]
        rows = weight.detach().transpose(0, self.channel_axis)
        rows = rows.flatten(1) if spec.per_channel else rows.reshape(1, -1)
        shape = [1] * weight.ndim
        if spec.per_channel:
            shape[self.channel_axis] = channels
        scale, zero_point = affine_parameters(*weight_range(rows, spec, symmetric), spec.bits, symmetric)
        self.scale, self.zero_point = scale.reshape(shape), zero_point.reshape(shape)

    def begin_fit(self, weight: Tensor, learn_scale: bool) -> None:
        """Start soft rounding at the weights' own values (METHOD P3)."""
        steps = weight.detach() / self.scale
        self._floor = steps.floor()
        self.rounding = nn.Parameter(rounding_start(steps - self._floor))
        self.log_factor = nn.Parameter(torch.zeros_like(self.scale)) if learn_scale else None
        self.mode = "soft"

    def begin_tuning(self, learn_scale: bool) -> None:
        """Let the scale of hard codes be learned."""
        self.log_factor = nn.Parameter(torch.zeros_like(self.scale)) if learn_scale else None

    def end_tuning(self, scale: Tensor) -> None:
        """Keep a scale that was learned."""
        self.scale, self.log_factor = scale, None

    def learned_scale(self) -> Tensor:
        """Give the scale with the fitted factor in it."""
        return self.scale if self.log_factor is None else self.scale * self.log_factor.exp()

    def hardened(self) -> tuple[Tensor, Tensor]:
        """Give the codes and the scale that the fit has reached, rounding up where `h >= 0.5`."""
        assert self.rounding is not None
        up = (soft_rounding(self.rounding) >= 0.5).to(self.scale)
        return (self._floor + up + self.zero_point).clamp(*self.limits), self.learned_scale().detach()

    def end_fit(self) -> None:
        """Forget the variables of the fit; the mode is the caller's to choose."""
        self.rounding = self.log_factor = None
        self.__dict__.pop("_floor", None)

    def set_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Hold hard integer codes from now on."""
        self.codes = codes.to(torch.int8 if self.signed else torch.uint8)
        self.scale = scale
        self.mode = "hard"

    def nearest_codes(self, weight: Tensor) -> Tensor:
        """Give the codes of rounding to nearest."""
        return quantize(weight, self.scale, self.zero_point, self.limits)

    def forward(self, weight: Tensor) -> Tensor:
        """Give the weight to compute with, in the shape of `weight`."""
        if self.mode == "off":
            return weight
        if self.mode == "hard":
            assert self.codes is not None
            return dequantize(self.codes.to(self.scale), self.learned_scale(), self.zero_point)
        if self.mode == "nearest":
            return dequantize(self.nearest_codes(weight), self.scale, self.zero_point)
        if self.mode == "settled":
            codes, scale = self.hardened()
            return dequantize(codes, scale, self.zero_point)
        assert self.rounding is not None
        codes = (self._floor + soft_rounding(self.rounding) + self.zero_point).clamp(*self.limits)
        return dequantize(codes, self.learned_scale(), self.zero_point)


class ActivationQuantizer(nn.Module):
    """Unsigned affine codes of one tensor, with a scale that can be learned and QDrop's random omission.

    Attributes:
        watching: In which pass of the calibration the input is only looked at, if any.
        enabled: Whether values are quantized at all.
        drop: Share of elements that stay as they are, drawn anew at each call (QDrop, arXiv 2203.05740), in [0, 1].
        generator: Source of that choice; it belongs to the fit, so that a resumed run draws the same.
    """

    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bits: int | None = 8
        self.enabled = False
        self.watching: Literal["extremes", "values"] | None = None
        self.observer = ActivationObserver()
        self.drop = 0.0
        self.generator: torch.Generator | None = None
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(()))

    def set_range(self, spec: QuantizerSpec | None) -> None:
        """Choose scale and zero point from what was observed; without a spec the values are never quantized."""
        self.bits = None if spec is None else spec.bits
        if spec is not None:
            scale, zero_point = affine_parameters(*self.observer.range(spec), spec.bits, symmetric=False)
            self.scale.data = scale.to(self.scale)
            self.zero_point = zero_point.to(self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Give `x` with its elements quantized, or as it is."""
        if self.watching == "extremes":
            self.observer.see_extremes(x)
        elif self.watching == "values":
            self.observer.see_values(x)
        if not self.enabled or self.bits is None:
            return x
        limits = code_limits(self.bits, signed=False)
        if not torch.is_grad_enabled() and self.drop == 0:
            return fake_quantize(x, self.scale, self.zero_point, limits)
        kept = random_mask(x, self.drop, self.generator) if self.drop > 0 else None
        return LearnedStepQuantize.apply(x, self.scale, self.zero_point, limits, kept)
