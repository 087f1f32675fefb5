"""The random batches of a fit."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pack_ptq.modules.easy_rows import EasyRows
from pack_ptq.modules.pack_data import PackData


class RandomBatches(IterableDataset):
    """Whole batches of random rows, or of some of them, drawn from a generator of their own.

    Args:
        data: All rows.
        batch_size: Rows of a batch; fewer if there are fewer.
        steps: Number of batches.
        seed: Of the generator.
        among: Rows to draw from.
        easy: Chooses them anew for every batch instead.
    """

    def __init__(
        self,
        data: PackData,
        batch_size: int,
        steps: int,
        seed: int,
        among: Tensor | None = None,
        easy: EasyRows | None = None,
    ) -> None:
        super().__init__()
        self.easy = easy
        self.data, self.steps = data, steps
        self.among = torch.arange(len(data.target)) if among is None else among
        self.batch_size = min(batch_size, len(self.among))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for step in range(self.steps):
            among = self.among if self.easy is None else self.easy.at(step, self.batch_size)
            drawn = torch.randperm(len(among), generator=self.generator)[: self.batch_size]
            yield self.data.rows(among[drawn])

    def loader(self) -> DataLoader:
        """Give the batches as Lightning takes them."""
        return DataLoader(self, batch_size=None)
