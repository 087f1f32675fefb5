"""Lightning callbacks: hooks of a few lines around the functions of the lower floors."""

from pack_ptq.callbacks.bits import BitAssignment, UniformBits
from pack_ptq.callbacks.curriculum import Curriculum
from pack_ptq.callbacks.evaluation import Evaluation
from pack_ptq.callbacks.keep_best import KeepBest
from pack_ptq.callbacks.keep_best_tuning import KeepBestTuning
from pack_ptq.callbacks.mixed_bits import MixedBits
from pack_ptq.callbacks.monitor import ReconstructionMonitor
from pack_ptq.callbacks.observation import Observation
from pack_ptq.callbacks.packing import (
    FixedPacking,
    HessianPacking,
    NoPacking,
    Packing,
    RandomPacking,
    WholePacking,
)
from pack_ptq.callbacks.progress import RunProgress, StepProgress
from pack_ptq.callbacks.scoring import HessianScoring
from pack_ptq.callbacks.tuning_monitor import TuningMonitor

__all__ = [
    "BitAssignment",
    "Curriculum",
    "Evaluation",
    "FixedPacking",
    "HessianPacking",
    "HessianScoring",
    "KeepBest",
    "KeepBestTuning",
    "MixedBits",
    "NoPacking",
    "Observation",
    "Packing",
    "RandomPacking",
    "ReconstructionMonitor",
    "RunProgress",
    "StepProgress",
    "TuningMonitor",
    "UniformBits",
    "WholePacking",
]
