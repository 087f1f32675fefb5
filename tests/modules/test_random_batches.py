"""The batches that a fit draws."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.random_batches import RandomBatches


def cached(rows: Tensor) -> Any:
    return fill(MemoryBudget(2**30), len(rows), rows.split(16), lambda x: x)


def test_random_batches_are_whole_and_seeded() -> None:
    rows = torch.arange(20.0)[:, None]
    data = PackData(cached(rows), cached(rows + 100), cached(rows + 200))

    def drawn(batch_size: int, seed: int) -> list[Tensor]:
        return [torch.cat(batch, 1) for batch in RandomBatches(data, batch_size, 5, seed)]

    batches = drawn(8, 3)
    assert len(batches) == len(RandomBatches(data, 8, 5, 3)) == 5
    for batch in batches:
        assert batch.shape == (8, 3)
        assert len(batch[:, 0].unique()) == 8, "without repeating a row"
        assert torch.equal(batch[:, 1] - batch[:, 0], torch.full((8,), 100.0)), "the three tensors go together"
        assert torch.equal(batch[:, 2] - batch[:, 0], torch.full((8,), 200.0))
    assert all(torch.equal(a, b) for a, b in zip(batches, drawn(8, 3), strict=True))
    assert not torch.equal(batches[0], drawn(8, 4)[0])
    assert drawn(500, 3)[0].shape == (20, 3), "never more than there are"
    through_loader = [torch.cat(batch, 1) for batch in RandomBatches(data, 8, 5, 3).loader()]
    assert all(torch.equal(a, b) for a, b in zip(batches, through_loader, strict=True))
    weighted = replace(data, weight=cached(rows + 300))
    assert all(torch.equal(b[0] + 300, b[3]) for b in RandomBatches(weighted, 8, 5, 3)), "and so does the weight"
    weighted.close()
    assert all(storage.budget.used == 0 for storage in (weighted.full_input, weighted.target, weighted.weight))
