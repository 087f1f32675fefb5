"""What fits move of a part, as it is at one moment, to be put back later."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from pack_ptq.graph.part import Part
from pack_ptq.quant.affine import dequantize


@dataclass(frozen=True)
class Snapshot:
    """Hard codes of a part's weights, and copies of all else that a fit moves.

    Attributes:
        weights: Codes, scale and zero point of every layer's weight.
        corrections: Of every layer's bias, with what its codes add on average if that is corrected; none if neither.
        activations: What `learned` gives of every quantizer of activations.
    """

    weights: tuple[tuple[Tensor, Tensor, Tensor], ...]
    corrections: tuple[Tensor | None, ...]
    activations: tuple[dict[str, Tensor], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, part: Part) -> Self:
        """Take the codes that a fit has reached so far; outside a fit, those of rounding to nearest."""
        weights, corrections = [], []
        for layer in part.layers.values():
            quantizer = layer.weight_quantizer
            if quantizer.rounding is not None:
                codes, scale = quantizer.hardened()
            else:
                codes, scale = quantizer.nearest_codes(layer.rounded_weight), quantizer.scale
            weights.append((codes, scale, quantizer.zero_point))
            correction = layer.whole_correction(dequantize(codes, scale, quantizer.zero_point))
            corrections.append(None if correction is None else correction.detach().clone())
        activations = tuple(quantizer.learned() for quantizer in part.quantizers)
        return cls(tuple(weights), tuple(corrections), activations)

    def put_back(self, part: Part) -> None:
        """Give the part what was taken of it; its weights are then held as hard codes."""
        for layer, weight, correction in zip(part.layers.values(), self.weights, self.corrections, strict=True):
            quantizer, device = layer.weight_quantizer, layer.weight.device
            codes, scale, quantizer.zero_point = (tensor.to(device) for tensor in weight)
            quantizer.set_codes(codes, scale)
            layer.correction = None if correction is None else nn.Parameter(correction.to(device), requires_grad=False)
        for activation, learned in zip(part.quantizers, self.activations, strict=True):
            activation.put_learned(learned)
