"""The bits of a network that is one pack between stem and head."""

from pack_ptq import Recipe, inner_links, plan_bits, tile_units
from pack_ptq.graph.chain import Chain
from pack_ptq.quant.products import operand_quantizers
from pack_ptq.types import BitPlan


def plan_for(chain: Chain, recipe: Recipe) -> BitPlan:
    first, last = inner_links(chain)
    units = tile_units(chain, [(0, last - first)])
    layers = [list(chain.layers_of(unit.start, unit.stop)) for unit in units]
    operands = [list(operand_quantizers(chain.products_of(unit.start, unit.stop))) for unit in units]
    return plan_bits(layers, [(recipe.weight.bits, recipe.activation.bits)] * len(units), recipe, operands)
