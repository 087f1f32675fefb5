"""The two quantizers of a layer: one for its weight, one for its input."""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from pack_ptq.quant.affine import (
    LearnedStepQuantize,
    Limits,
    affine_parameters,
    code_limits,
    dequantize,
    fake_quantize,
    quantize,
)
from pack_ptq.quant.channel_observer import ChannelObserver
from pack_ptq.quant.dropping import random_mask
from pack_ptq.quant.focusing import focusing_bounds, focusing_quantize
from pack_ptq.quant.log_sqrt2 import log_sqrt2_quantize, log_sqrt2_scale
from pack_ptq.quant.observers import ActivationObserver
from pack_ptq.quant.ranges import weight_range
from pack_ptq.quant.rounding import rounding_start, soft_rounding
from pack_ptq.quant.row_observer import RowObserver, row_shares
from pack_ptq.quant.split_channels import search_split
from pack_ptq.types import ActivationKind, QuantizerSpec

WeightMode = Literal["off", "nearest", "soft", "settled", "hard"]
Role = Literal["any", "softmax", "gelu"]


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
    """Unsigned codes of one tensor, with a scale that can be learned and QDrop's random omission.

    Attributes:
        role: What the values come of, by which a recipe chooses the kind.
        kind: `uniform` affine codes; `focusing` on a learned part of the range; `log_sqrt2`, in steps of half a bit;
            `row_scaled`, uniform codes of what each value is beside the largest of its row.
        watching: In which pass of the calibration the input is only looked at, if any.
        observer: Of all values.
        channels: Of every channel, where they are to be made alike or split.
        copies: Extra codes below and above of every channel, the last axis, if any; shape (2, channels).
        rows: Of values beside the largest of their row, after softmax; none if it is not known which axis is summed,
            where `focusing` stands in for `row_scaled`.
        enabled: Whether values are quantized at all.
        drop: Share of elements that stay as they are, drawn anew at each call (QDrop, arXiv 2203.05740), in [0, 1].
        generator: Source of that choice; it belongs to the fit, so that a resumed run draws the same.
        scale: Distance of two codes; of the kind `log_sqrt2` the value of code 0 above `lower`.
        lower: Value of the lowest code of the kind `focusing`; what stands for zero in `log_sqrt2`.
    """

    zero_point: Tensor
    copies: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.bits: int | None = 8
        self.role: Role = "any"
        self.kind: ActivationKind = "uniform"
        self.enabled = False
        self.watching: Literal["extremes", "values"] | None = None
        self.observer = ActivationObserver()
        self.channels: ChannelObserver | None = None
        self.rows: RowObserver | None = None
        self.drop = 0.0
        self.generator: torch.Generator | None = None
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.lower = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(()))
        self.register_buffer("copies", None)

    @property
    def expansion(self) -> Fraction:
        """Codes of all channels over the number of channels, at least 1."""
        return column_share(self.copies)

    @property
    def is_quantizing(self) -> bool:
        """Whether it gives its input in codes."""
        return self.enabled and self.bits is not None

    @property
    def is_active(self) -> bool:
        """Whether it does anything with its input."""
        return self.watching is not None or self.is_quantizing

    def set_range(self, spec: QuantizerSpec | None, kind: ActivationKind = "uniform", most_copies: float = 0.0) -> None:
        """Choose the codes from what was observed.

        Args:
            spec: Bits and the kind of observer; without one the values are never quantized.
            kind: Of the codes.
            most_copies: Extra codes of channels over their number, at most, where every channel was observed.
        """
        self.bits, self.kind, self.copies = None if spec is None else spec.bits, kind, None
        if spec is None:
            return
        if kind == "row_scaled" and self.rows is None:
            self.kind = kind = "focusing"
        lower = torch.zeros(())
        split = None
        if kind == "uniform" and spec.observer == "mse" and self.channels is not None and most_copies > 0:
            split = search_split(self.channels, spec.bits, most_copies)
        if split is not None:
            scale, self.zero_point = split.scale, split.zero_point.to(self.zero_point)
            self.copies = split.copies.to(self.zero_point)
        elif kind == "uniform":
            scale, zero_point = affine_parameters(*self.observer.range(spec), spec.bits, symmetric=False)
            self.zero_point = zero_point.to(self.zero_point)
        elif kind == "focusing":
            lower, scale = focusing_bounds(*self.observer.counts(), spec.bits)
        elif kind == "row_scaled" and self.rows is not None:
            scale, self.zero_point = self.rows.scale(spec.bits), torch.zeros_like(self.zero_point)
        else:
            lower = self.observer.low.clamp(max=0).float().cpu()
            scale = log_sqrt2_scale(*self.observer.counts(), spec.bits, lower.item())
        self.scale.data, self.lower.data = scale.to(self.scale), lower.to(self.lower)

    def learn(self, wanted: bool) -> None:
        """Let a fit move the scale, and the lower end where there is one, if the values are quantized at all."""
        wanted = wanted and self.bits is not None
        self.scale.requires_grad_(wanted)
        self.lower.requires_grad_(wanted and self.kind == "focusing")

    @property
    def variables(self) -> list[nn.Parameter]:
        """What `learn` lets a fit move."""
        return [variable for variable in (self.scale, self.lower) if variable.requires_grad]

    def learned(self) -> dict[str, Tensor]:
        """Give a copy of what a fit may move."""
        return {"scale": self.scale.detach().clone(), "lower": self.lower.detach().clone()}

    def put_learned(self, values: dict[str, Tensor]) -> None:
        """Put back a copy of what `learned` gave."""
        self.scale.data = values["scale"].to(self.scale, copy=True)
        self.lower.data = values["lower"].to(self.lower, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Give `x` with its elements quantized, or as it is."""
        for observer in (self.observer, self.channels, self.rows) if self.watching else ():
            if observer is not None and self.watching == "extremes":
                observer.see_extremes(x)
            elif observer is not None:
                observer.see_values(x)
        if not self.is_quantizing:
            return x
        assert self.bits is not None
        kept = random_mask(x, self.drop, self.generator) if self.drop > 0 else None
        if self.kind == "focusing":
            return focusing_quantize(x, self.lower, self.scale, self.bits, kept)
        if self.kind == "log_sqrt2":
            return log_sqrt2_quantize(x, self.scale, self.bits, self.lower, kept)
        if self.kind == "row_scaled" and self.rows is not None:
            shares, largest = row_shares(x, self.rows.axis)
            return self._uniform(shares, kept) * largest
        return self._uniform(x, kept)

    def _uniform(self, x: Tensor, kept: Tensor | None) -> Tensor:
        assert self.bits is not None
        limits: Limits = code_limits(self.bits, signed=False)
        if self.copies is not None:
            limits = -limits[1] * self.copies[0], limits[1] * (1 + self.copies[1])
        if not torch.is_grad_enabled() and kept is None:
            return fake_quantize(x, self.scale, self.zero_point, limits)
        return LearnedStepQuantize.apply(x, self.scale, self.zero_point, limits, kept)


def column_share(copies: Tensor | None) -> Fraction:
    """Give the codes of all channels over their number, where some may have extra ones of shape (2, channels)."""
    return Fraction(1) if copies is None else 1 + Fraction(int(copies.sum()), copies.shape[1])
