"""Score the blocks while the calibration samples pass by (METHOD P1)."""

from typing import Any, Literal

import lightning as L
import torch

from pack_ptq.distributed import share_left
from pack_ptq.errors import UserError, refuse
from pack_ptq.hessian import HessianScorer, check_variant
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.packing import inner_links
from pack_ptq.types import BlockScores


class HessianScoring(L.Callback):
    """Hessian scores of all blocks between stem and head (METHOD P1); the result is in `scores`.

    Args:
        loss: `kl` against the full-precision output, which needs no labels, or the labelled `task` loss.
        num_samples: Calibration samples to score on, over all processes together; all of them if not given.
        variant: The `paper`'s score, or that of the authors' `release`: KL with the quantized network as reference,
            and the squared change averaged over a block's output elements instead of summed.

    Raises:
        UserError: `num_samples` is below 1, or the variant does not know the loss.
    """

    def __init__(
        self,
        loss: Literal["kl", "task"] = "kl",
        num_samples: int | None = None,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise refuse("scoring.init_args.num_samples", num_samples, "1 or more")
        check_variant(variant, loss)
        self.loss, self.num_samples, self.variant = loss, num_samples, variant
        self.scores: BlockScores | None = None
        self._scorer: HessianScorer | None = None

    def on_validation_start(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Begin with empty sums."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        start, stop = inner_links(module.chain)
        self._scorer = HessianScorer(module.chain, start, stop, self.loss, data.task_loss, self.variant)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        module: WholeNetwork,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch."""
        assert self._scorer is not None
        x, label = batch
        if self.loss == "task" and bool((label < 0).any()):
            raise UserError("scoring.init_args.loss is 'task', but calibration samples lack labels; allowed: 'kl'")
        share = share_left(self.num_samples, trainer.global_rank, trainer.world_size, self._scorer.num_samples)
        if len(x[:share]):
            self._scorer.update(x[:share], label[:share])

    def on_validation_end(self, trainer: L.Trainer, module: WholeNetwork) -> None:  # type: ignore[override]
        """Merge over the processes and show the scores in TensorBoard."""
        assert self._scorer is not None
        self.scores = self._scorer.compute()
        if trainer.logger is not None:
            for index, (score, error) in enumerate(zip(self.scores.scores, self.scores.squared_error, strict=True)):
                trainer.logger.log_metrics({"scores/hessian": score, "scores/squared_error": error}, step=index)
        self._scorer = None


def finite_scores(scores: BlockScores) -> None:
    """Refuse scores that are not numbers.

    Raises:
        UserError: A block's score is NaN or infinite; the message names the block.
    """
    for name, score in zip(scores.names, scores.scores, strict=True):
        if not torch.isfinite(torch.tensor(score)):
            raise UserError(f"the Hessian score of block {name} is {score}; allowed: finite outputs of the network")
