"""The activation cache: where rows lie, that they are equal everywhere, and what happens without room."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pack_ptq.cache import MemoryBudget, Storage, fill
from pack_ptq.errors import UserError

ROWS = torch.arange(60.0).reshape(10, 3, 2)


def filled(budget: MemoryBudget, rows: Tensor = ROWS, size: int = 4) -> Storage:
    return fill(budget, len(rows), rows.split(size), lambda x: x)


def test_memory_first_then_a_mapped_file(tmp_path: Path) -> None:
    budget = MemoryBudget(2 * ROWS.nbytes, folder=tmp_path)
    stores = [filled(budget) for _ in range(3)]
    assert [store.mapped for store in stores] == [False, False, True]
    assert budget.used == 2 * ROWS.nbytes
    for store in stores:
        assert torch.equal(store.tensor, ROWS)
    small = filled(budget, ROWS[:1])
    assert small.mapped, "not a byte above the limit"
    assert list(tmp_path.iterdir()) == [], "the file has no name any more"


def test_close_gives_memory_back(tmp_path: Path) -> None:
    budget = MemoryBudget(ROWS.nbytes, folder=tmp_path)
    first, second = filled(budget), filled(budget)
    second.close()
    assert budget.used == ROWS.nbytes, "a mapped file took none"
    first.close()
    assert budget.used == 0
    first.close()
    assert budget.used == 0
    assert len(first) == 0
    assert not filled(budget).mapped


@pytest.mark.parametrize("limit", [10**6, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_rows_are_equal_and_fresh(tmp_path: Path, limit: int, dtype: torch.dtype) -> None:
    rows = ROWS.to(dtype)
    store = filled(MemoryBudget(limit * dtype.itemsize // 4, folder=tmp_path), rows)
    assert store.mapped == (limit == 100)
    assert len(store) == 10
    index = torch.tensor([7, 0, 7, 3])
    assert torch.equal(store.rows(index), rows[index])
    assert torch.equal(store.rows(slice(2, 5)), rows[2:5])
    for taken in (store.rows(slice(0, 10)), store.rows(index)):
        taken.zero_()
    assert torch.equal(store.tensor, rows), "a caller cannot overwrite the cache"


@given(count=st.integers(1, 20), written=st.integers(1, 7), read=st.integers(1, 9), mapped=st.booleans())
def test_any_batch_sizes(count: int, written: int, read: int, mapped: bool) -> None:
    rows = torch.arange(2.0 * count).reshape(count, 2)
    budget = MemoryBudget(8 * min(written, count) if mapped else 10**6)
    store = fill(budget, count, rows.split(written), lambda x: 2 * x)
    assert torch.equal(torch.cat(list(store.batches(read))), 2 * rows)
    assert [len(x) for x in store.batches(read)] == [len(x) for x in rows.split(read)]


def test_compute_may_change_the_form_and_records_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    store = fill(MemoryBudget(10**6), 10, ROWS.split(4), lambda x: (x * weight).sum((1, 2)))
    assert store.tensor.shape == (10,)
    assert not store.tensor.requires_grad
    assert torch.equal(store.tensor, ROWS.sum((1, 2)))


IMAGES = torch.arange(840.0).reshape(5, 4, 6, 7)
LAYOUTS = {
    "contiguous": IMAGES,
    "channels last": IMAGES.contiguous(memory_format=torch.channels_last),
    "tokens seen as channels": IMAGES.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
    "one channel": IMAGES[:, :1].contiguous(memory_format=torch.channels_last),
    "a part of the columns": IMAGES[..., 2:5],
    "one pixel for all": IMAGES[..., :1, :1].expand(5, 4, 6, 7),
    "numbers": IMAGES[:, 0, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mapped", [False, True])
def test_rows_keep_their_memory_layout(layout: str, mapped: bool, tmp_path: Path) -> None:
    rows = LAYOUTS[layout]
    limit = rows[:2].nbytes if mapped else 2**20
    store = filled(MemoryBudget(limit, folder=tmp_path), rows, size=2)
    assert store.mapped == mapped
    index = torch.tensor([4, 0, 4])
    for taken, expected in ((slice(1, 4), rows[1:4]), (index, rows[index]), (slice(0, 1), rows[:1])):
        found = store.rows(taken)
        assert torch.equal(found, expected)
        if layout not in ("a part of the columns", "one pixel for all"):  # which no dense tensor has
            copied = expected.clone().stride()
            assert [s for s, n in zip(found.stride(), found.shape, strict=True) if n > 1] == [
                s for s, n in zip(copied, found.shape, strict=True) if n > 1
            ]
    store.close()
    assert store.budget.used == 0


def test_budget_below_one_batch_is_refused(tmp_path: Path) -> None:
    size = ROWS[:4].nbytes
    with pytest.raises(
        UserError, match=rf"recipe\.reconstruction\.cache_bytes is {size - 1}; allowed: {size} or more.* batch of 4"
    ):
        filled(MemoryBudget(size - 1, folder=tmp_path))
    assert torch.equal(filled(MemoryBudget(size, folder=tmp_path)).tensor, ROWS)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"240 bytes.*No space left.*recipe\.reconstruction\.cache_bytes"):
        filled(MemoryBudget(100, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        filled(MemoryBudget(100, folder=tmp_path / "gone"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    stores = [filled(MemoryBudget(100, folder=tmp_path)) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    del stores
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "unmapped with its last tensor"
