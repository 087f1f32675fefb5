"""Importance scores of blocks from second-order information (METHOD P1)."""

from collections.abc import Callable, Iterable
from math import prod
from typing import Literal

import torch
from torch import Tensor

from pack_ptq.distributed import all_reduce
from pack_ptq.errors import refuse
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import quantized
from pack_ptq.losses import kl_from_full_precision
from pack_ptq.types import BlockScores

TaskLoss = Callable[[Tensor, Tensor], Tensor]
Variant = Literal["paper", "release"]


def check_variant(variant: Variant, loss: Literal["kl", "task"]) -> None:
    """Refuse an unknown variant, and one that does not know the loss.

    Raises:
        UserError: `variant` is neither `paper` nor `release`, or it is `release` and the loss is not `kl`.
    """
    if variant not in ("paper", "release"):
        raise refuse("scoring.init_args.variant", variant, "paper, release")
    if variant == "release" and loss != "kl":
        raise refuse("scoring.init_args.loss", loss, "kl with scoring.init_args.variant release")


class HessianScorer:
    """`S_b = E[2 (L_q^b - dz^T g)] / E[dz^T dz]`, summed batch by batch, so every sample counts once.

    One full forward gives the full-precision input of every block; a block's quantized output is run through the links
    after it only. That is about N/2 + 1 forwards in all. With the loss `kl` the gradient `g` at full precision is zero,
    so nothing is differentiated; with `task` one backward gives `g` at every block.

    The variant `release` is what the authors' code computes: `S_b = 2 E[KL(p_q || p_fp)] / (E[dz^T dz] / n_b)`, with
    the quantized network as reference, no first-order term, and `n_b` elements in one sample's output of the block.

    Args:
        chain: The prepared network with its ranges set; all quantizers off.
        start: First block (link of the chain).
        stop: Link after the last block.
        loss: `kl` against the full-precision output, or `task` for the labelled loss.
        task_loss: Gives one loss per sample from (output, label); needed for `task`.
        variant: `paper` or `release`, which knows the loss `kl` only.

    Raises:
        UserError: There is no such variant of the loss.
    """

    def __init__(
        self,
        chain: Chain,
        start: int,
        stop: int,
        loss: Literal["kl", "task"] = "kl",
        task_loss: TaskLoss | None = None,
        variant: Variant = "paper",
    ) -> None:
        check_variant(variant, loss)
        self.chain, self.start, self.stop = chain, start, stop
        self.loss, self.task_loss, self.variant = loss, task_loss, variant
        self.sums = torch.zeros(3, stop - start, dtype=torch.float64)  # loss increase, dz^T g, dz^T dz
        self.num_samples = 0

    def update(self, x: Tensor, label: Tensor | None = None) -> None:
        """Take one batch of inputs, and of labels for the loss `task`."""
        end = len(self.chain)
        with torch.set_grad_enabled(self.loss == "task"):
            x = x.detach().requires_grad_(self.loss == "task")
            found = self.chain.run_collecting(x, 0, end, range(self.start, self.stop + 1))
            values = {self.start: x, **found} if self.start == 0 else found
            slopes = dict.fromkeys(range(self.start + 1, self.stop + 1))
            if self.loss == "task":
                losses = self._labelled_loss(found[end], label)
                slopes = dict(zip(slopes, torch.autograd.grad(losses.sum(), [values[i] for i in slopes]), strict=True))
        with torch.no_grad():
            for link in range(self.start, self.stop):
                self._add(link, values, slopes[link + 1], label)
        self.num_samples += len(x)

    def _add(self, link: int, values: dict[int, Tensor], slope: Tensor | None, label: Tensor | None) -> None:
        with quantized(self.chain.operations_of(link, link + 1), "nearest"):
            output = self.chain.run(values[link].detach(), link, link + 1)
        change = output - values[link + 1]
        end = len(self.chain)
        logits, reference = self.chain.run(output, link + 1), values[end]
        if self.variant == "release":
            increase = kl_from_full_precision(reference.double(), logits.double())  # the roles are exchanged
        elif self.loss == "kl":
            increase = kl_from_full_precision(logits.double(), reference.double())
        else:
            increase = self._labelled_loss(logits, label) - self._labelled_loss(reference, label)
        first_order = 0.0 if slope is None else (change * slope).sum(dtype=torch.float64)
        squared = change.square().sum(dtype=torch.float64)
        sums = torch.stack([increase.double().sum(), torch.as_tensor(first_order).to(squared), squared])
        self.sums[:, link - self.start] += sums.cpu()

    def _labelled_loss(self, output: Tensor, label: Tensor | None) -> Tensor:
        if self.task_loss is None or label is None:
            raise ValueError("the loss 'task' needs task_loss and labels")
        return self.task_loss(output, label)

    def _elements(self, link: int) -> int:
        """Give the number of elements in one sample's output of a link."""
        return prod(self.chain.form_behind(link).at(1))

    def compute(self) -> BlockScores:
        """Merge over processes and give the scores."""
        sums = all_reduce(self.sums)
        count = int(all_reduce(torch.tensor(self.num_samples)))
        increase, first_order, squared = sums / count
        scores = torch.where(squared > 0, 2 * (increase - first_order) / squared.clamp(min=1e-300), 0.0)
        if self.variant == "release":
            scores = scores * torch.tensor([self._elements(link) for link in range(self.start, self.stop)])
        names = self.chain.names[self.start : self.stop]
        return BlockScores(names, tuple(scores.tolist()), tuple(increase.tolist()), tuple(squared.tolist()), count)


def score_blocks(
    chain: Chain,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    start: int,
    stop: int,
    loss: Literal["kl", "task"] = "kl",
    task_loss: TaskLoss | None = None,
    variant: Variant = "paper",
) -> BlockScores:
    """Score the blocks `start..stop-1` over batches of inputs, or of (inputs, labels); see `HessianScorer`."""
    scorer = HessianScorer(chain, start, stop, loss, task_loss, variant)
    for batch in batches:
        x, label = batch if isinstance(batch, tuple | list) else (batch, None)
        scorer.update(x, label)
    return scorer.compute()
