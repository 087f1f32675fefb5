"""The random mask of QDrop: share, layout, and that a generator repeats it."""

import pytest
import torch

from pack_ptq.quant.dropping import random_mask


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_share_of_ones(share: float) -> None:
    mask = random_mask(torch.empty(3, 41, 37), share, torch.Generator().manual_seed(0))
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 5, 7), (4, 2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_form_follows_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype)
    mask = random_mask(x, 0.5)
    assert mask.shape == x.shape
    assert mask.dtype == dtype


def test_memory_layout_follows_the_tensor() -> None:
    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert random_mask(x, 0.5).is_contiguous(memory_format=torch.channels_last)
    expanded = torch.zeros(()).expand(3, 4)
    assert random_mask(expanded, 0.5).unique().numel() == 2, "each element has a draw of its own"


def test_generator_repeats_and_neighbours_differ() -> None:
    x = torch.empty(1000)
    first, second = (random_mask(x, 0.5, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    draws = torch.stack([random_mask(x, 0.5, torch.Generator().manual_seed(s)) for s in range(50)]).mean(0)
    assert draws.min() > 0.1, "no byte of a word is constant"
    assert draws.max() < 0.9
