"""Form packs of neighbouring blocks (METHOD P2, and the baselines of the paper's ablation)."""

import lightning as L
import torch

from pack_ptq import packing
from pack_ptq.callbacks.scoring import HessianScoring, finite_scores
from pack_ptq.errors import refuse
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.types import BlockScores, Unit


class Packing(L.Callback):
    """Turns scores into packs when scoring has ended; a rule is a subclass with the one method `packs`.

    The units of the whole chain (stem, packs, head) are then in `units`. It must come after the scoring callback.
    """

    def __init__(self) -> None:
        self.units: list[Unit] = []

    def packs(self, scores: BlockScores) -> packing.Packs:
        """Give (start, stop) pairs that tile the blocks, counted from the first block."""
        raise NotImplementedError

    def on_validation_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Form the packs from the scores of the scoring callback."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        scores = next(c.scores for c in callbacks if isinstance(c, HessianScoring))
        finite_scores(scores)
        self.units = packing.tile_units(module.chain, self.packs(scores))


class HessianPacking(Packing):
    """A block starts a pack if its score is below every earlier one.

    Args:
        max_blocks: A memory limit; longer packs are split at their lowest inner scores.
    """

    def __init__(self, max_blocks: int | None = None) -> None:
        super().__init__()
        packing.check_max_blocks(max_blocks)
        self.max_blocks = max_blocks

    def packs(self, scores: BlockScores) -> packing.Packs:
        """Apply the paper's rule."""
        return packing.hessian_packs(list(scores.scores), self.max_blocks)


class NoPacking(Packing):
    """Every block by itself."""

    def packs(self, scores: BlockScores) -> packing.Packs:
        """Give packs of one block."""
        return packing.fixed_packs(len(scores.names), 1)


class FixedPacking(Packing):
    """Packs of a fixed number of blocks.

    Args:
        size: Blocks in a pack, 1 or more; the last pack may have fewer.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        if size < 1:
            raise refuse("packing.init_args.size", size, "1 or more")
        self.size = size

    def packs(self, scores: BlockScores) -> packing.Packs:
        """Give packs of `size` blocks."""
        return packing.fixed_packs(len(scores.names), self.size)


class RandomPacking(Packing):
    """Random cuts, seeded.

    Args:
        seed: Of the cuts; the run's own if not given.
        max_blocks: Most blocks in a pack.
    """

    def __init__(self, seed: int | None = None, max_blocks: int | None = None) -> None:
        super().__init__()
        packing.check_max_blocks(max_blocks)
        self.seed, self.max_blocks = seed, max_blocks

    def packs(self, scores: BlockScores) -> packing.Packs:
        """Cut at random."""
        seed = torch.initial_seed() if self.seed is None else self.seed  # Lightning has seeded torch for the run
        return packing.random_packs(len(scores.names), seed, self.max_blocks)


class WholePacking(Packing):
    """All blocks in one pack."""

    def packs(self, scores: BlockScores) -> packing.Packs:
        """Give one pack."""
        return packing.fixed_packs(len(scores.names), len(scores.names))
