"""Sums over processes, which are no-ops when there is one."""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Give this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_reduce(x: Tensor, how: str = "sum") -> Tensor:
    """Give the sum, minimum or maximum of `x` over all processes, on the device of `x`."""
    if world()[1] == 1:
        return x
    on_gpu = dist.get_backend() == "nccl"
    moved = x.to("cuda" if on_gpu else "cpu").contiguous().clone()
    dist.all_reduce(moved, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how])
    return moved.to(x.device)


def barrier() -> None:
    """Wait until every process is here."""
    all_reduce(torch.zeros(1))


def share_left(limit: int | None, rank: int, processes: int, seen: int) -> int | None:
    """Give how many samples a process may still take where `limit` counts those of all; nothing without a limit."""
    return None if limit is None else max(0, -(-(limit - rank) // processes) - seen)
