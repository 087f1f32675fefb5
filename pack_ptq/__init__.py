"""Post-training quantization of vision networks by Pack-PTQ."""

from pack_ptq.api import evaluate, load, quantize, read_report
from pack_ptq.bits import plan_bits
from pack_ptq.budget import BitBudget, MixedUnit
from pack_ptq.calibration import observe, set_ranges
from pack_ptq.errors import UserError
from pack_ptq.graph.prepare import prepare
from pack_ptq.hessian import score_blocks
from pack_ptq.mixed import mix_bits
from pack_ptq.models import ModelSource
from pack_ptq.packing import fixed_packs, hessian_packs, inner_links, random_packs, tile_units
from pack_ptq.reconstruct import reconstruct
from pack_ptq.sensitivity import layer_sizes, measure_sensitivity
from pack_ptq.types import Hardware, QuantizerSpec, Recipe, ReconstructionSpec, TuningSpec
from pack_ptq.workplace import Workplace

__all__ = [
    "BitBudget",
    "Hardware",
    "MixedUnit",
    "ModelSource",
    "QuantizerSpec",
    "Recipe",
    "ReconstructionSpec",
    "TuningSpec",
    "UserError",
    "Workplace",
    "evaluate",
    "fixed_packs",
    "hessian_packs",
    "inner_links",
    "layer_sizes",
    "load",
    "measure_sensitivity",
    "mix_bits",
    "observe",
    "plan_bits",
    "prepare",
    "quantize",
    "random_packs",
    "read_report",
    "reconstruct",
    "score_blocks",
    "set_ranges",
    "tile_units",
]
