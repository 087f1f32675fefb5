"""How far a part's output is from its target, in the measure of the fit's loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from pack_ptq.distributed import all_reduce
from pack_ptq.losses import reconstruction_loss
from pack_ptq.modules.pack_data import PackData

EVALUATION_SAMPLES = 256
ROWS = 64  # of one pass


@torch.no_grad()
def output_error(run: Callable[[Tensor], Tensor], data: PackData) -> float:
    """Give the reconstruction loss of `run` on the first samples of the cache, averaged over processes."""
    count = min(EVALUATION_SAMPLES, len(data.target))
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, count, ROWS):
        _, quantized_input, target, *weight = data.rows(slice(start, min(start + ROWS, count)))
        loss = reconstruction_loss(run(quantized_input), target, *weight).item()
        sums += torch.tensor([loss * len(target), len(target)], dtype=torch.float64)
    total, samples = all_reduce(sums)
    return (total / samples).item()


@torch.no_grad()
def row_errors(run: Callable[[Tensor], Tensor], data: PackData) -> Tensor:
    """Give the reconstruction loss of `run` on each row of the cache, shape (rows,), on the CPU."""
    errors = []
    for start in range(0, len(data.target), ROWS):
        _, quantized_input, *wanted = data.rows(slice(start, start + ROWS))
        rows = zip(*(tensor.split(1) for tensor in (run(quantized_input), *wanted)), strict=True)
        errors.append(torch.stack([reconstruction_loss(*row) for row in rows]).cpu())
    return torch.cat(errors)
