"""Views of calibration inputs: the first is the sample itself, and every iteration gives the same."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from pack_ptq.views import Views, derived_seed

ROWS = torch.arange(10.0).reshape(10, 1)


def shake(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + torch.rand(len(inputs), 1, generator=generator)


def together(views: Views) -> Tensor:
    return torch.cat(list(views))


@pytest.mark.parametrize(
    "batches", [ROWS.split(4), [(x, x + 1) for x in ROWS.split(4)], [[x, 0] for x in ROWS.split(4)]]
)
def test_the_first_view_is_the_samples_themselves(batches: Any) -> None:
    views = Views(batches, "cpu", shake, 3, seed=1)
    assert [len(x) for x in views] == views.sizes() * 3 == [4, 4, 2] * 3
    first, second, third = together(views).split(10)
    assert torch.equal(first, ROWS)
    for changed in (second, third):
        assert ((changed - ROWS > 0) & (changed - ROWS < 1)).all(), "row for row the same samples"
    assert not torch.equal(second, third)


def test_every_iteration_gives_the_same_whatever_the_global_generator() -> None:
    views = Views(ROWS.split(4), "cpu", shake, 3, seed=1)
    once = together(views)
    torch.rand(5)
    next(iter(views))
    assert torch.equal(together(views), once)
    assert torch.equal(together(Views(ROWS.split(4), "cpu", shake, 3, seed=1)), once)
    other = together(Views(ROWS.split(4), "cpu", shake, 3, seed=2))
    assert torch.equal(other[:10], ROWS)
    assert not torch.equal(other, once)
    assert torch.equal(together(Views(ROWS.split(4), "cpu", shake, 2, seed=1)), once[:20]), (
        "more views keep the first ones"
    )


def test_without_a_change_there_is_one_view() -> None:
    views = Views(ROWS.split(4), "cpu", None, 5, seed=1)
    assert (views.count, views.sizes()) == (1, [4, 4, 2])
    assert torch.equal(together(views), ROWS)


@pytest.mark.parametrize(
    ("left_out", "sizes"), [([], [4, 4, 2]), ([5], [4, 3, 2]), ([4, 5, 6, 7], [4, 2]), ([0, 3, 9], [2, 4, 1])]
)
def test_samples_can_be_left_out_of_every_view(left_out: list[int], sizes: list[int]) -> None:
    views = Views([[x, 0] for x in ROWS.split(4)], "cpu", shake, 2, seed=1, left_out=left_out)
    assert views.sizes() == sizes
    first, second = together(views).split(10 - len(left_out))
    assert first.flatten().tolist() == [row for row in range(10) if row not in left_out]
    assert ((second - first > 0) & (second - first < 1)).all()


def test_processes_share_nothing_but_the_shape_of_their_views() -> None:
    """Two processes draw other changes for other samples, and their first views together are all samples."""
    shards = [Views(ROWS[rank::2].split(2), "cpu", shake, 2, derived_seed(3, rank)) for rank in (0, 1)]
    first, second = (together(views) for views in shards)
    assert sorted(torch.cat([first[:5], second[:5]]).flatten().tolist()) == ROWS.flatten().tolist()
    assert not torch.allclose(first[5:] - first[:5], second[5:] - second[:5])


def test_seeds_tell_their_parts_apart() -> None:
    parts: list[tuple] = [
        (0,),
        (1,),
        (11,),
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 0, 1),
        ("tuning", 0),
        ("tuning", 1),
        ("view", 0),
    ]
    seeds = {derived_seed(seed, *part) for seed in (0, 1, 10) for part in parts}
    assert len(seeds) == 3 * len(parts)
    assert all(0 <= seed < 2**56 for seed in seeds)
    by_hand = hashlib.sha256(b"7/tuning/1").digest()[:7]
    assert derived_seed(7, "tuning", 1) == int.from_bytes(by_hand, "big"), "a resumed run draws the same"
