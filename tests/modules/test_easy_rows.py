"""The rows of a curriculum, and the batches drawn from them."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.modules.easy_rows import EasyRows
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.random_batches import RandomBatches


def data_of(count: int) -> PackData:
    rows = fill(MemoryBudget(2**20), count, [torch.arange(float(count))[:, None]], lambda x: x)
    return PackData(rows, rows, rows)


def errors_of(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(1, 30), st.integers(1, 70))
def test_rows_are_those_of_the_lowest_losses(count: int, start: float, steps: int, at_least: int) -> None:
    easy = EasyRows(errors_of(count), start, steps)
    sizes = []
    for step in range(steps + 1):
        rows = easy.at(step, at_least)
        sizes.append(len(rows))
        assert len(rows) >= min(count, at_least)
        assert len(rows.unique()) == len(rows)
        left = torch.ones(count, dtype=torch.bool)
        left[rows] = False
        assert not left.any() or easy.errors[rows].max() <= easy.errors[left].min()
    assert sizes == sorted(sizes)
    assert sizes[-1] == count


def test_sizes_by_hand() -> None:
    easy = EasyRows(torch.arange(10.0).flip(0), 0.5, 4)
    assert [len(easy.at(step, 1)) for step in range(6)] == [5, 7, 8, 9, 10, 10]
    assert easy.at(0, 2).tolist() == [9, 8, 7, 6, 5]


def test_batches_are_drawn_from_the_lowest_losses_of_their_time() -> None:
    easy = EasyRows(torch.arange(40.0), 0.25, 4)
    for step, (batch, _, _) in enumerate(RandomBatches(data_of(40), 6, 4, seed=3, easy=easy)):
        assert set(batch[:, 0].long().tolist()) <= set(easy.at(step, 6).tolist())
        easy.errors = easy.errors.flip(0)  # what is measured anew counts from the next batch on


def test_whole_share_draws_as_many_from_all() -> None:
    drawn = [b[0] for b in RandomBatches(data_of(20), 8, 5, seed=3, easy=EasyRows(torch.arange(20.0), 1.0, 5))]
    assert all(torch.equal(a, b[0]) for a, b in zip(drawn, RandomBatches(data_of(20), 8, 5, seed=3), strict=True))
