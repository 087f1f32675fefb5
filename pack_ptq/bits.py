"""Give every layer its bits: those of its pack, and those of the protocol for the first and the last layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from pack_ptq.types import BITS, BitGranularity, BitPlan, Recipe

# The highest candidate of the release's mixed mode by target width (METHOD P4).
HIGHEST_CANDIDATE = {2: 4, 3: 4, 4: 6, 5: 8, 6: 8, 7: 8, 8: 8}
# What packs may get around a target width; 3, 4 and 6 are the paper's (METHOD P4).
CANDIDATES = {2: (2, 3, 4), 3: (2, 3, 4), 4: (3, 4, 6), 5: (4, 5, 6), 6: (4, 6, 8), 7: (6, 7, 8), 8: (6, 7, 8)}
UNQUANTIZED = 32


def candidates(bits: int, granularity: BitGranularity = "pack") -> tuple[int, ...]:
    """Give the widths to choose from around a target width: for packs the paper's, for layers from 2 below to 3 above.

    Single layers differ more than packs: the input of a convolution may bear 2 bits where its neighbour wants 6.
    """
    return CANDIDATES[bits] if granularity == "pack" else tuple(width for width in BITS if -2 <= width - bits <= 3)


@dataclass(frozen=True)
class LayerSize:
    """Counts of a layer, or of an operand of a product, the last two for one sample.

    Attributes:
        weights: Elements of the weight; 0 for an operand.
        inputs: Elements of the input.
        macs: Multiplications with accumulation; those of a product count for its first operand.
        expansion: Columns of the input over its channels where outlying ones are split, 1 or more, by the input's bits;
            1 for bits that it lacks.
    """

    weights: int
    inputs: int
    macs: int
    expansion: Mapping[int, Fraction] = field(default_factory=dict)

    def at(self, bits: int) -> "LayerSize":
        """Give the counts with an input of so many bits, whose extra columns all of them have."""
        grown = self.expansion.get(bits, Fraction(1))
        return replace(
            self, weights=int(self.weights * grown), inputs=int(self.inputs * grown), macs=int(self.macs * grown)
        )


def protocol_bits(first: str, last: str, recipe: Recipe) -> BitPlan:
    """Give the bits that the protocol fixes, whatever the packs get (METHOD, 'First and last layer')."""
    weight: dict[str, int] = {}
    activation: dict[str, int | None] = {first: None}  # the image itself
    if recipe.protocol == "first_last_8":
        weight[first] = weight[last] = activation[first] = activation[last] = 8
    elif recipe.protocol == "boundary_high":
        weight[first] = weight[last] = HIGHEST_CANDIDATE[recipe.weight.bits]
        if last != first:
            activation[last] = HIGHEST_CANDIDATE[recipe.activation.bits]
    return BitPlan(weight, activation)


def unit_bits(layers: Sequence[str], bits: tuple[int, int], protocol: BitPlan, operands: Sequence[str] = ()) -> BitPlan:
    """Give the layers and operands of one unit its weight and activation bits, where the protocol leaves them free."""
    weight = {path: protocol.weight.get(path, bits[0]) for path in layers}
    return BitPlan(weight, {path: protocol.activation.get(path, bits[1]) for path in (*layers, *operands)})


def plan_bits(
    packs: Sequence[Sequence[str]],
    pack_bits: Sequence[tuple[int, int]],
    recipe: Recipe,
    operands: Sequence[Sequence[str]] | None = None,
) -> BitPlan:
    """Spread bits per unit over the layers and apply the first/last-layer protocol (METHOD, 'First and last layer').

    Args:
        packs: Layer paths of every unit (stem, packs, head), or of what else shares its bits; the first layer of all
            comes first, the last one last.
        pack_bits: Weight and activation bits of every unit.
        recipe: Names the protocol.
        operands: Names of the operands of products of every unit, if there are any.
    """
    weight: dict[str, int] = {}
    activation: dict[str, int | None] = {}
    paths = [path for layers in packs for path in layers]
    protocol = protocol_bits(paths[0], paths[-1], recipe)
    for layers, bits, names in zip(packs, pack_bits, operands or [()] * len(packs), strict=True):
        unit = unit_bits(layers, bits, protocol, names)
        weight.update(unit.weight)
        activation.update(unit.activation)
    return BitPlan(weight, activation)


def spending(plan: BitPlan, sizes: Mapping[str, LayerSize]) -> dict[str, int]:
    """Give what the bits of some layers and operands cost, as whole numbers that add up over them.

    Returns:
        `weight_bits` and `activation_bits`, which are the averages before their division by the elements;
        `weight_bytes` of codes packed layer by layer; `bit_operations`, MACs x weight bits x activation bits of one
        sample. An input that is not quantized counts 32 bits. Both operands of a product have the same bits. Columns
        of split channels count as often as they are there.
    """
    total = dict.fromkeys(("weight_bits", "activation_bits", "weight_bytes", "bit_operations"), 0)
    for path, bits in plan.activation.items():
        activation = bits or UNQUANTIZED
        size = sizes[path].at(activation)
        weight = plan.weight.get(path, activation)
        total["weight_bits"] += weight * size.weights
        total["activation_bits"] += activation * size.inputs
        total["weight_bytes"] += -(-weight * size.weights // 8)
        total["bit_operations"] += size.macs * weight * activation
    return total


def average_weight_bits(bits: Mapping[str, float], elements: Mapping[str, int]) -> float:
    """Give the mean bits of a weight, weighted by element counts."""
    return sum(bits[path] * elements[path] for path in bits) / sum(elements[path] for path in bits)


def average_activation_bits(bits: Mapping[str, float | None], elements: Mapping[str, int]) -> float:
    """Give the mean bits of a layer's input element; an input that is not quantized counts 32."""
    return sum((bits[path] or UNQUANTIZED) * elements[path] for path in bits) / sum(elements[path] for path in bits)
