"""Fit one unit of the chain to its cached activations: as a whole, or layer by layer."""

import time

from pack_ptq.fit_layers import fit_layers
from pack_ptq.fit_part import fit_part
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import unit_part
from pack_ptq.modules.pack_data import PackData
from pack_ptq.types import Recipe, Unit, UnitResult
from pack_ptq.workplace import Workplace


def reconstruct_unit(
    chain: Chain, unit: Unit, data: PackData, recipe: Recipe, place: Workplace, label: str
) -> UnitResult:
    """Fit one unit and leave its layers with hard codes.

    Args:
        chain: The prepared network with its ranges set, all quantizers off.
        unit: The links to fit.
        data: Cached activations.
        recipe: Settings and number of steps.
        place: Where to run; its seed is of this unit and process.
        label: Of the curves in TensorBoard.
    """
    began = time.perf_counter()
    if recipe.reconstruction.granularity == "layer":
        fitted = fit_layers(chain, unit, data, recipe, place, label)
    else:
        fitted = fit_part(unit_part(chain, unit, label), data, recipe, place)
    seconds = time.perf_counter() - began
    losses = fitted.nearest_loss, fitted.final_loss, fitted.accepted
    return UnitResult(unit.name, unit.blocks, fitted.steps, *losses, seconds, fitted.ranks)
