"""What shares its bits when packs, or the layers in them, get different ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pack_ptq.graph.chain import Chain
from pack_ptq.quant.products import operand_quantizers
from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.types import BitGranularity, Unit


@dataclass(frozen=True)
class BitGroup:
    """Layers and operands of products with the same bits.

    Attributes:
        name: Of the unit, or the path of the first layer or product.
        start: The link from which the network must run again when their bits change.
        layers: Paths, in execution order.
        operands: Names of operands of products.
        free: Whether the bits are to be chosen; those of the stem and the head are not.
    """

    name: str
    start: int
    layers: tuple[str, ...]
    operands: tuple[str, ...]
    free: bool


def bit_groups(chain: Chain, units: Sequence[Unit], granularity: BitGranularity = "pack") -> list[BitGroup]:
    """Part the layers and products of a network by what shares its bits, in execution order.

    Args:
        chain: The prepared network.
        units: As `tile_units` gives them.
        granularity: `pack` leaves a pack together, `layer` parts it into its layers and its products, but for those
            that read one tensor with one quantizer, such as linear layers for queries, keys and values.
    """
    groups = []
    for unit in units:
        free = unit.kind == "pack"
        if free and granularity == "layer":
            groups += _by_quantizer(chain, unit)
        else:
            layers = tuple(chain.layers_of(unit.start, unit.stop))
            operands = tuple(operand_quantizers(chain.products_of(unit.start, unit.stop)))
            groups.append(BitGroup(unit.name, unit.start, layers, operands, free))
    return groups


def _by_quantizer(chain: Chain, unit: Unit) -> list[BitGroup]:
    found: list[tuple[BitGroup, set[ActivationQuantizer]]] = []
    for link in range(unit.start, unit.stop):
        for path, layer in chain.layers_of(link, link + 1).items():
            _join(found, BitGroup(path, link, (path,), (), free=True), {layer.input_quantizer})
        for path, product in chain.products_of(link, link + 1).items():
            operands = operand_quantizers({path: product})
            _join(found, BitGroup(path, link, (), tuple(operands), free=True), set(operands.values()))
    last = list(chain.layers)[-1]  # the protocol knows the last layer by its place
    return sorted((group for group, _ in found), key=lambda group: last in group.layers)


def _join(
    found: list[tuple[BitGroup, set[ActivationQuantizer]]], new: BitGroup, quantizers: set[ActivationQuantizer]
) -> None:
    """Add a group, or, where its quantizers belong to others, melt these and it into the first of them."""
    touched = [entry for entry in found if entry[1] & quantizers]
    if not touched:
        found.append((new, quantizers))
        return
    parts = [group for group, _ in touched] + [new]
    layers, operands = (
        tuple(name for part in parts for name in getattr(part, what)) for what in ("layers", "operands")
    )
    joined = replace(parts[0], layers=layers, operands=operands)
    found[found.index(touched[0])] = (joined, set().union(quantizers, *(held for _, held in touched)))
    for entry in touched[1:]:
        found.remove(entry)
