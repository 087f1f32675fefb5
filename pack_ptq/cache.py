"""Cached activations within a memory budget: on the device, then in RAM, then in a memory-mapped file."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pack_ptq.errors import UserError

# What a fit itself needs on an accelerator must stay free.
DEVICE_SHARE = 0.5
CACHE_FILE = ".cache-"


class MemoryBudget:
    """Where the next cached tensor goes.

    Args:
        limit: Bytes of cached activations to hold in memory, on the device and in RAM together, 1 or more.
        device: Where the computation runs.
        folder: For the files of what does not fit; the system's temporary folder if none.
    """

    def __init__(self, limit: int, device: torch.device | str = "cpu", folder: Path | None = None) -> None:
        self.limit, self.device, self.folder = limit, torch.device(device), folder
        self.used = 0

    def check_batch(self, batch: Tensor) -> None:
        """Refuse a budget that does not hold one batch.

        Raises:
            UserError: The batch is larger than the limit.
        """
        if batch.nbytes > self.limit:
            raise UserError(
                f"recipe.reconstruction.cache_bytes is {self.limit}; allowed: {batch.nbytes} or more, "
                f"which one batch of {len(batch)} takes"
            )

    def allocate(self, count: int, rows: Tensor) -> "Storage":
        """Reserve room for `count` rows like those of a batch, in the same memory layout."""
        size = count * rows[:1].nbytes
        if self.used + size > self.limit:
            return Storage(count, rows, None, self)
        device = self.device
        if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE:
            device = torch.device("cpu")
        self.used += size
        return Storage(count, rows, device, self)


class Storage:
    """One tensor of (samples, ...) whose rows are written once and then read in any order.

    Args:
        count: Number of samples.
        like: A batch, which gives the form, type and memory layout of the rows.
        device: Where it lies; nothing for a memory-mapped file.
        budget: To which `close` gives the memory back.
    """

    def __init__(self, count: int, like: Tensor, device: torch.device | None, budget: MemoryBudget) -> None:
        self.budget, self.mapped = budget, device is None
        order = _memory_order(like)
        shape = (count, *(like.shape[axis] for axis in order[1:]))
        if device is None:
            tensor = _mapped_tensor(shape, like.dtype, budget.folder)
        else:
            tensor = torch.empty(shape, dtype=like.dtype, device=device)
        self.tensor = tensor.permute([order.index(axis) for axis in range(like.ndim)])

    def __len__(self) -> int:
        return len(self.tensor)

    def rows(self, index: Tensor | slice) -> Tensor:
        """Give rows as a new tensor on the device of the computation."""
        rows = self.tensor[index.to(self.tensor.device) if isinstance(index, Tensor) else index]
        device = self.budget.device
        return rows.to(device) if device != rows.device else rows.clone() if isinstance(index, slice) else rows

    def batches(self, size: int) -> Iterator[Tensor]:
        """Give all rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    def close(self) -> None:
        """Give the memory back."""
        if not self.mapped:
            self.budget.used -= self.tensor.nbytes
        self.tensor = torch.empty(0)


def _memory_order(x: Tensor) -> list[int]:
    """Give the axes from the slowest to the fastest, samples first; rows that are not dense are taken as contiguous."""
    strides = torch.empty_like(x, device="meta").stride()
    return [0, *sorted(range(1, x.ndim), key=lambda axis: -strides[axis])]


def _mapped_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    count = int(torch.Size(shape).numel())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=CACHE_FILE) as file:
            # A sparse file on a full disk would end the process at the first write into it.
            os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
            # The mapping outlives the name, so nothing is left behind even if the process is killed.
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        raise UserError(
            f"no room for {count * dtype.itemsize} bytes of cached activations in {folder}: {error.strerror}; "
            "allowed: a disk with room, or a larger recipe.reconstruction.cache_bytes"
        ) from error


@torch.no_grad()
def fill(budget: MemoryBudget, count: int, batches: Iterable[Tensor], compute: Callable[[Tensor], Tensor]) -> Storage:
    """Store `compute(batch)` of all batches.

    Args:
        budget: Decides where the rows lie.
        count: Number of samples in all batches.
        batches: Of shape (batch, ...).
        compute: Gives one row per sample.

    Raises:
        UserError: The budget is smaller than one batch.
    """
    storage, start = None, 0
    for batch in batches:
        rows = compute(batch)
        if storage is None:
            budget.check_batch(rows)
            storage = budget.allocate(count, rows)
        storage.tensor[start : start + len(rows)] = rows.to(storage.tensor.device)
        start += len(rows)
    assert storage is not None
    return storage
