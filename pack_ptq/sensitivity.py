"""How much the network's output suffers when one pack or layer is quantized, by measurement (METHOD P4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pack_ptq.bit_groups import BitGroup, bit_groups
from pack_ptq.bits import UNQUANTIZED, LayerSize, candidates, protocol_bits
from pack_ptq.distributed import all_reduce
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.losses import kl_from_full_precision
from pack_ptq.quant.quantizers import ActivationQuantizer, WeightQuantizer, column_share
from pack_ptq.types import BitGranularity, PackSensitivity, Recipe, Unit

Kind = Literal["weight", "activation"]
Quantizer = WeightQuantizer | ActivationQuantizer
Range = dict[str, Any]  # attributes of a quantizer


@dataclass(frozen=True)
class _Candidate:
    """One width for the weights or the activations of one group, as far as the protocol leaves them free."""

    group: BitGroup
    kind: Kind
    width: int
    quantizers: list[Quantizer]
    ranges: list[Range]


class SensitivityMeter:
    """`KL(p_fp || p_q)` with only one group's weights at some width, and with only its inputs at some width.

    A group is a pack, or what of it shares its bits (`bit_groups`). It is summed batch by batch, so every sample counts
    once. One full forward gives the full-precision input of every group's first link; a candidate runs that link and
    those after it only. Layers whose bits the protocol fixes are no part of the perturbation; a group of nothing else
    has the recipe's width as its only candidate, which costs nothing.

    Args:
        chain: The prepared network, observed, with its ranges set; all quantizers off. Its ranges stay as they are.
        units: As `tile_units` gives them; the packs among them are measured.
        recipe: Kinds of ranges, and the protocol.
        weights: Candidates, 2 to 8 bits; those around the recipe's bits if not given (`candidates`).
        activations: The same for the inputs of layers.
        granularity: Whether to measure packs, or every layer and product in them.
    """

    def __init__(
        self,
        chain: Chain,
        units: Sequence[Unit],
        recipe: Recipe,
        weights: Sequence[int] | None = None,
        activations: Sequence[int] | None = None,
        granularity: BitGranularity = "pack",
    ) -> None:
        self.chain, self.groups = chain, [group for group in bit_groups(chain, units, granularity) if group.free]
        widths = {
            "weight": weights or candidates(recipe.weight.bits, granularity),
            "activation": activations or candidates(recipe.activation.bits, granularity),
        }
        paths = list(chain.layers)
        fixed = protocol_bits(paths[0], paths[-1], recipe)
        self._candidates: list[_Candidate] = []
        for group in self.groups:
            layers = {path: chain.layers[path] for path in group.layers}
            free: dict[Quantizer, Tensor | None] = {
                layer.weight_quantizer: layer.weight for path, layer in layers.items() if path not in fixed.weight
            }
            self._add(group, "weight", free, widths["weight"], recipe)
            inputs = (*group.layers, *group.operands)
            free = {chain.quantizers[name]: None for name in inputs if name not in fixed.activation}
            self._add(group, "activation", free, widths["activation"], recipe)
        self.sums = torch.zeros(len(self._candidates), dtype=torch.float64)
        self.num_samples = 0

    def _add(
        self, group: BitGroup, kind: Kind, free: dict[Quantizer, Tensor | None], widths: Sequence[int], recipe: Recipe
    ) -> None:
        for width in sorted(set(widths)) if free else [getattr(recipe, kind).bits]:
            self._candidates.append(_Candidate(group, kind, width, list(free), _ranges(free, width, recipe)))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take one batch of inputs."""
        end = len(self.chain)
        found = {0: x, **self.chain.run_collecting(x, 0, end, {group.start for group in self.groups})}
        reference = found[end].double()
        sums = [self._divergence(candidate, found[candidate.group.start], reference) for candidate in self._candidates]
        self.sums += torch.stack(sums).cpu()
        self.num_samples += len(x)

    def _divergence(self, candidate: _Candidate, x: Tensor, reference: Tensor) -> Tensor:
        if not candidate.quantizers:
            return reference.new_zeros(())
        before = [_range(quantizer) for quantizer in candidate.quantizers]
        _put(candidate.quantizers, candidate.ranges)
        _turn(candidate.quantizers, on=True)
        logits = self.chain.run(x, candidate.group.start)
        _turn(candidate.quantizers, on=False)
        _put(candidate.quantizers, before)
        return kl_from_full_precision(logits.double(), reference).sum()

    def compute(self) -> tuple[PackSensitivity, ...]:
        """Merge over processes and give the sensitivities of the groups, in order.

        Raises:
            UserError: A divergence is no number; the message names the group.
        """
        means = (all_reduce(self.sums) / all_reduce(torch.tensor(self.num_samples))).clamp(min=0).tolist()
        result = {group.name: PackSensitivity(group.name, {}, {}) for group in self.groups}
        for candidate, mean in zip(self._candidates, means, strict=True):
            if not mean < float("inf"):
                what = f"the KL divergence with {candidate.width} {candidate.kind} bits in {candidate.group.name}"
                raise UserError(f"{what} is {mean}; allowed: finite outputs of the network")
            getattr(result[candidate.group.name], candidate.kind)[candidate.width] = mean
        return tuple(result.values())

    def sizes(self) -> dict[str, LayerSize]:
        """Give `layer_sizes` with the columns of split channels at every candidate, and at the bits as they are."""
        found = {each: {each.bits or UNQUANTIZED: each.expansion} for each in self.chain.quantizers.values()}
        for candidate in self._candidates:
            for quantizer, values in zip(candidate.quantizers, candidate.ranges, strict=True):
                if isinstance(quantizer, ActivationQuantizer):
                    found[quantizer][candidate.width] = column_share(values["copies"])
        return {
            name: replace(size, expansion=found[self.chain.quantizers[name]])
            for name, size in layer_sizes(self.chain).items()
        }


def measure_sensitivity(
    chain: Chain,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    units: Sequence[Unit],
    recipe: Recipe,
    weights: Sequence[int] | None = None,
    activations: Sequence[int] | None = None,
    granularity: BitGranularity = "pack",
) -> tuple[PackSensitivity, ...]:
    """Measure the packs over batches of inputs, or of (inputs, labels); see `SensitivityMeter`."""
    meter = SensitivityMeter(chain, units, recipe, weights, activations, granularity)
    for batch in batches:
        meter.update(batch[0] if isinstance(batch, tuple | list) else batch)
    return meter.compute()


def layer_sizes(chain: Chain) -> dict[str, LayerSize]:
    """Give the counts of every layer and of every operand of a product, by which bits are averaged and summed."""
    sizes = {path: LayerSize(la.weight.numel(), la.input_elements, la.macs) for path, la in chain.layers.items()}
    for path, product in chain.products.items():
        for index, (operand, elements) in enumerate(product.input_elements.items()):
            sizes[f"{path}.{operand}"] = LayerSize(0, elements, 0 if index else product.macs)
    return sizes


def _ranges(quantizers: dict[Quantizer, Tensor | None], width: int, recipe: Recipe) -> list[Range]:
    """Search the ranges for a width, with its weight for each quantizer of weights; leave them as they were."""
    found = []
    for quantizer, weight in quantizers.items():
        before = _range(quantizer)
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.set_range(
                replace(recipe.activation, bits=width), recipe.kind_of(quantizer.role), recipe.split_channels
            )
        elif weight is not None:
            quantizer.set_range(weight, replace(recipe.weight, bits=width), recipe.profile == "deploy")
        found.append(_range(quantizer))
        _put([quantizer], [before])
    return found


def _turn(quantizers: Sequence[Quantizer], on: bool) -> None:
    for quantizer in quantizers:
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.enabled = on
        else:
            quantizer.mode = "nearest" if on else "off"


def _range(quantizer: Quantizer) -> Range:
    common = {"bits": quantizer.bits, "scale": quantizer.scale.data, "zero_point": quantizer.zero_point}
    if isinstance(quantizer, WeightQuantizer):
        return common
    return {**common, "lower": quantizer.lower.data, "kind": quantizer.kind, "copies": quantizer.copies}


def _put(quantizers: Sequence[Quantizer], ranges: Sequence[Range]) -> None:
    for quantizer, values in zip(quantizers, ranges, strict=True):
        for name, value in values.items():
            if isinstance(getattr(quantizer, name), nn.Parameter):
                getattr(quantizer, name).data = value  # a parameter, which stays the same object
            else:
                setattr(quantizer, name, value)
