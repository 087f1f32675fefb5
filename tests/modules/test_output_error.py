"""Errors of a part's output, over the first rows together and of every row."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.modules.output_error import EVALUATION_SAMPLES, output_error, row_errors
from pack_ptq.modules.pack_data import PackData

SHAPES = [(7,), (3, 5), (3, 4, 4)]


def cached(rows: Tensor) -> Any:
    return fill(MemoryBudget(2**30), len(rows), rows.split(50), lambda x: x)


def drawn(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 64, 70, EVALUATION_SAMPLES + 9])
def test_errors_by_hand(shape: tuple[int, ...], count: int) -> None:
    x, target, weight = drawn(count, *shape)
    data = PackData(cached(torch.zeros_like(x)), cached(x), cached(target))
    for each, square in (
        (data, (2 * x - target) ** 2),
        (replace(data, weight=cached(weight.abs())), weight.abs() * (2 * x - target) ** 2),
    ):
        # Summed over channels, averaged over all that comes behind them.
        expected = square.sum(1).flatten(1).mean(1) if len(shape) > 1 else square.sum(1)
        assert torch.allclose(row_errors(double, each), expected, rtol=1e-5)
        first = expected[:EVALUATION_SAMPLES].mean().item()
        assert output_error(double, each) == pytest.approx(first, rel=1e-5)
