"""How much the network's output suffers when one pack is quantized, by measurement (METHOD P4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pack_ptq.bits import CANDIDATES, LayerSize, protocol_bits
from pack_ptq.distributed import all_reduce
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.losses import kl_from_full_precision
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from pack_ptq.types import PackSensitivity, Recipe, Unit

Kind = Literal["weight", "activation"]
Range = tuple[int | None, Tensor, Tensor]  # bits, scale, zero point


@dataclass(frozen=True)
class _Candidate:
    """One width for the weights or the inputs of one pack; `layers` are those that the protocol leaves free."""

    unit: Unit
    kind: Kind
    width: int
    layers: list[QuantizedLayer]
    ranges: list[Range]


class SensitivityMeter:
    """`KL(p_fp || p_q)` with only one pack's weights at some width, and with only its inputs at some width.

    It is summed batch by batch, so every sample counts once. One full forward gives the full-precision input of every
    pack; a candidate runs the pack and the links after it only. Layers whose bits the protocol fixes are no part of
    the perturbation; a pack of nothing else has the recipe's width as its only candidate, which costs nothing.

    Args:
        chain: The prepared network, observed, with its ranges set; all quantizers off. Its ranges stay as they are.
        units: As `tile_units` gives them; the packs among them are measured.
        recipe: Kinds of ranges, and the protocol.
        weights: Candidates, 2 to 8 bits; those around the recipe's bits if not given.
        activations: The same for the inputs of layers.
    """

    def __init__(
        self,
        chain: Chain,
        units: Sequence[Unit],
        recipe: Recipe,
        weights: Sequence[int] | None = None,
        activations: Sequence[int] | None = None,
    ) -> None:
        self.chain, self.packs = chain, [unit for unit in units if unit.kind == "pack"]
        paths = list(chain.layers)
        fixed = protocol_bits(paths[0], paths[-1], recipe)
        self._candidates: list[_Candidate] = []
        for unit in self.packs:
            layers = chain.layers_of(unit.start, unit.stop)
            free = [layer for path, layer in layers.items() if path not in fixed.weight]
            self._add(unit, "weight", free, weights or CANDIDATES[recipe.weight.bits], recipe)
            free = [layer for path, layer in layers.items() if path not in fixed.activation]
            self._add(unit, "activation", free, activations or CANDIDATES[recipe.activation.bits], recipe)
        self.sums = torch.zeros(len(self._candidates), dtype=torch.float64)
        self.num_samples = 0

    def _add(self, unit: Unit, kind: Kind, layers: list[QuantizedLayer], widths: Sequence[int], recipe: Recipe) -> None:
        for width in sorted(set(widths)) if layers else [getattr(recipe, kind).bits]:
            self._candidates.append(_Candidate(unit, kind, width, layers, _ranges(layers, kind, width, recipe)))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take one batch of inputs."""
        end = len(self.chain)
        found = {0: x, **self.chain.run_collecting(x, 0, end, {unit.start for unit in self.packs})}
        reference = found[end].double()
        sums = [self._divergence(candidate, found[candidate.unit.start], reference) for candidate in self._candidates]
        self.sums += torch.stack(sums).cpu()
        self.num_samples += len(x)

    def _divergence(self, candidate: _Candidate, x: Tensor, reference: Tensor) -> Tensor:
        if not candidate.layers:
            return reference.new_zeros(())
        quantizers = [_quantizer(layer, candidate.kind) for layer in candidate.layers]
        before = [_range(quantizer) for quantizer in quantizers]
        _put(quantizers, candidate.ranges)
        of_weights = candidate.kind == "weight"
        switch(candidate.layers, "nearest" if of_weights else "off", activations=not of_weights)
        logits = self.chain.run(x, candidate.unit.start)
        switch(candidate.layers, "off", activations=False)
        _put(quantizers, before)
        return kl_from_full_precision(logits.double(), reference).sum()

    def compute(self) -> tuple[PackSensitivity, ...]:
        """Merge over processes and give the sensitivities of the packs, in order.

        Raises:
            UserError: A divergence is no number; the message names the pack.
        """
        means = (all_reduce(self.sums) / all_reduce(torch.tensor(self.num_samples))).clamp(min=0).tolist()
        result = {unit.name: PackSensitivity(unit.name, {}, {}) for unit in self.packs}
        for candidate, mean in zip(self._candidates, means, strict=True):
            if not mean < float("inf"):
                what = f"the KL divergence with {candidate.width} {candidate.kind} bits in {candidate.unit.name}"
                raise UserError(f"{what} is {mean}; allowed: finite outputs of the network")
            getattr(result[candidate.unit.name], candidate.kind)[candidate.width] = mean
        return tuple(result.values())


def measure_sensitivity(
    chain: Chain,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    units: Sequence[Unit],
    recipe: Recipe,
    weights: Sequence[int] | None = None,
    activations: Sequence[int] | None = None,
) -> tuple[PackSensitivity, ...]:
    """Measure the packs over batches of inputs, or of (inputs, labels); see `SensitivityMeter`."""
    meter = SensitivityMeter(chain, units, recipe, weights, activations)
    for batch in batches:
        meter.update(batch[0] if isinstance(batch, tuple | list) else batch)
    return meter.compute()


def layer_sizes(chain: Chain) -> dict[str, LayerSize]:
    """Give the counts of every layer, by which bits are averaged and summed."""
    return {path: LayerSize(la.weight.numel(), la.input_elements, la.macs) for path, la in chain.layers.items()}


def _quantizer(layer: QuantizedLayer, kind: Kind) -> WeightQuantizer | ActivationQuantizer:
    return layer.weight_quantizer if kind == "weight" else layer.input_quantizer


def _ranges(layers: Sequence[QuantizedLayer], kind: Kind, width: int, recipe: Recipe) -> list[Range]:
    """Search the ranges for a width, and leave the layers as they were."""
    found = []
    for layer in layers:
        quantizer = _quantizer(layer, kind)
        before = _range(quantizer)
        if isinstance(quantizer, WeightQuantizer):
            quantizer.set_range(layer.weight, replace(recipe.weight, bits=width), recipe.profile == "deploy")
        else:
            quantizer.set_range(replace(recipe.activation, bits=width))
        found.append(_range(quantizer))
        _put([quantizer], [before])
    return found


def _range(quantizer: WeightQuantizer | ActivationQuantizer) -> Range:
    return quantizer.bits, quantizer.scale.data, quantizer.zero_point


def _put(quantizers: Sequence[WeightQuantizer | ActivationQuantizer], ranges: Sequence[Range]) -> None:
    for quantizer, (bits, scale, zero_point) in zip(quantizers, ranges, strict=True):
        quantizer.bits, quantizer.zero_point = bits, zero_point  # type: ignore[assignment]
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.scale.data = scale  # a parameter, which stays the same object
        else:
            quantizer.scale = scale
