"""Give every layer its bits: those of its pack, and those of the protocol for the first and the last layer."""

from collections.abc import Sequence

from pack_ptq.types import BitPlan, Recipe

# The highest candidate of the release's mixed mode by target width (METHOD P4).
HIGHEST_CANDIDATE = {2: 4, 3: 4, 4: 6, 5: 8, 6: 8, 7: 8, 8: 8}


def plan_bits(packs: Sequence[Sequence[str]], pack_bits: Sequence[tuple[int, int]], recipe: Recipe) -> BitPlan:
    """Spread bits per unit over the layers and apply the first/last-layer protocol (METHOD, 'First and last layer').

    Args:
        packs: Layer paths of every unit (stem, packs, head), all in execution order.
        pack_bits: Weight and activation bits of every unit.
        recipe: Names the protocol.
    """
    weight: dict[str, int] = {}
    activation: dict[str, int | None] = {}
    for layers, (weight_bits, activation_bits) in zip(packs, pack_bits, strict=True):
        weight.update(dict.fromkeys(layers, weight_bits))
        activation.update(dict.fromkeys(layers, activation_bits))
    first, last = packs[0][0], packs[-1][-1]
    activation[first] = None  # the image itself
    if recipe.protocol == "first_last_8":
        weight[first] = weight[last] = activation[first] = activation[last] = 8
    elif recipe.protocol == "boundary_high":
        weight[first] = weight[last] = HIGHEST_CANDIDATE[recipe.weight.bits]
        if last != first:
            activation[last] = HIGHEST_CANDIDATE[recipe.activation.bits]
    return BitPlan(weight, activation)


def average_weight_bits(bits: dict[str, int], elements: dict[str, int]) -> float:
    """Give the mean bits of a weight, weighted by element counts."""
    return sum(bits[path] * elements[path] for path in bits) / sum(elements[path] for path in bits)


def average_activation_bits(bits: dict[str, int | None], elements: dict[str, int]) -> float:
    """Give the mean bits of a layer's input element; an input that is not quantized counts 32."""
    return sum((bits[path] or 32) * elements[path] for path in bits) / sum(elements[path] for path in bits)
