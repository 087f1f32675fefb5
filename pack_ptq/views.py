"""Calibration inputs, each taken several times: once as it is, then changed at random."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]


def derived_seed(seed: int, *parts: int | str) -> int:
    """Give the seed of one part of a run, so that no two parts draw alike and a resumed run draws the same."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class Views:
    """Inputs of calibration batches, view after view; every iteration gives the same.

    Args:
        batches: Inputs of shape (batch, ...), or pairs of inputs and labels; iterated more than once.
        device: Where the inputs go.
        augment: Changes inputs at random as their kind of data allows; without it there is one view.
        count: Views of each sample, 1 or more; the first one is the sample itself.
        seed: Of the changes.
        left_out: Places of samples that are in no view, fewer than there are.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        device: torch.device | str = "cpu",
        augment: Augment | None = None,
        count: int = 1,
        seed: int = 0,
        left_out: Iterable[int] = (),
    ) -> None:
        self.batches, self.augment, self.seed, self.device = batches, augment, seed, device
        self.left_out = frozenset(left_out)
        self.count = count if augment is not None else 1

    def sizes(self) -> list[int]:
        """Give the samples of every batch of one view."""
        return [len(inputs) for inputs in self._inputs()]

    def _inputs(self) -> Iterator[Tensor]:
        begin = 0
        for batch in self.batches:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            kept = [row for row in range(len(inputs)) if begin + row not in self.left_out]
            begin += len(inputs)
            if kept:
                yield inputs if len(kept) == len(inputs) else inputs[kept]

    def __iter__(self) -> Iterator[Tensor]:
        for view in range(self.count):
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "view", view))
            for inputs in self._inputs():
                if view > 0 and self.augment is not None:
                    inputs = self.augment(inputs.cpu(), generator)
                yield inputs.to(self.device)
