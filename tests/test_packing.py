"""Packs tile the blocks, and Hessian packing is the paper's recursion."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pack_ptq import fixed_packs, hessian_packs, inner_links, prepare, random_packs, tile_units
from pack_ptq.errors import UserError
from pack_ptq.packing import check_max_blocks

SCORES = st.lists(st.floats(-10, 10) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=40)
LIMITS = st.none() | st.integers(1, 12)


def tiles(packs: list[tuple[int, int]], count: int) -> bool:
    return [i for start, stop in packs for i in range(start, stop)] == list(range(count)) and all(
        a < b for a, b in packs
    )


def paper_packs(scores: list[float]) -> list[tuple[int, int]]:
    """Transcribe METHOD P2 word by word: blocks count from 1, scopes hold both their ends."""
    s = {t: score for t, score in enumerate(scores, start=1)}
    packs = []
    t_s, t_e = 1, len(scores)
    while t_e >= t_s:
        lowest = min(s[t] for t in range(t_s, t_e + 1))
        t_min = next(t for t in range(t_s, t_e + 1) if s[t] == lowest)
        packs.append((t_min, t_e))
        t_e = t_min - 1
    return [(first - 1, last) for first, last in sorted(packs)]


@given(SCORES)
def test_hessian_packs_are_the_papers(scores: list[float]) -> None:
    packs = hessian_packs(scores)
    assert packs == paper_packs(scores)
    assert tiles(packs, len(scores))
    starts = {start for start, _ in packs}
    for block, score in enumerate(scores):
        assert (block in starts) == all(score < earlier for earlier in scores[:block])


@pytest.mark.parametrize(
    ("scores", "packs"),
    [
        ([], []),
        ([7.0], [(0, 1)]),
        ([4.0, 3.0, 2.0, 1.0], [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([1.0, 2.0, 3.0, 4.0], [(0, 4)]),
        ([1.0, 1.0, 1.0], [(0, 3)]),
        ([5.0, 6.0, 3.0, 4.0, 4.0, -1.0], [(0, 2), (2, 5), (5, 6)]),
    ],
)
def test_hessian_packs_by_hand(scores: list[float], packs: list[tuple[int, int]]) -> None:
    assert hessian_packs(scores) == packs


@given(SCORES, st.integers(1, 12))
def test_max_blocks_only_splits(scores: list[float], limit: int) -> None:
    packs, whole = hessian_packs(scores, limit), hessian_packs(scores)
    assert tiles(packs, len(scores))
    assert max(stop - start for start, stop in packs) <= limit
    assert {start for start, _ in whole} <= {start for start, _ in packs}
    fitting = [pack for pack in whole if pack[1] - pack[0] <= limit]
    assert set(fitting) <= set(packs)


@given(SCORES, st.integers(0, 5))
def test_wide_max_blocks_changes_nothing(scores: list[float], room: int) -> None:
    assert hessian_packs(scores, len(scores) + room) == hessian_packs(scores)


def test_long_pack_is_split_before_its_lowest_inner_score() -> None:
    assert hessian_packs([0.0, 3.0, 1.0, 2.0, 5.0], max_blocks=3) == [(0, 2), (2, 5)]
    assert hessian_packs([0.0, 3.0, 1.0, 2.0, 5.0], max_blocks=2) == [(0, 2), (2, 3), (3, 5)]


@given(st.integers(1, 40), st.integers(1, 45))
def test_fixed_packs(count: int, size: int) -> None:
    packs = fixed_packs(count, size)
    assert tiles(packs, count)
    assert all(stop - start == size for start, stop in packs[:-1])
    assert 1 <= packs[-1][1] - packs[-1][0] <= size


@given(st.integers(1, 40), st.integers(0, 1000), LIMITS)
def test_random_packs_tile_and_repeat(count: int, seed: int, limit: int | None) -> None:
    packs = random_packs(count, seed, limit)
    assert tiles(packs, count)
    assert limit is None or max(stop - start for start, stop in packs) <= limit
    state = random.getstate()
    assert random_packs(count, seed, limit) == packs
    assert random.getstate() == state, "the global generator is not touched"


def test_random_packs_differ_by_seed_and_cut_at_one_half() -> None:
    drawn = [random_packs(20, seed) for seed in range(200)]
    assert len({tuple(packs) for packs in drawn}) > 150
    cuts = sum(len(packs) - 1 for packs in drawn) / (200 * 19)
    assert cuts == pytest.approx(0.5, abs=0.04)


def test_max_blocks_below_one_is_refused() -> None:
    check_max_blocks(None)
    check_max_blocks(1)
    with pytest.raises(UserError, match=r"packing\.init_args\.max_blocks is 0; allowed: 1 or more"):
        check_max_blocks(0)


def test_stem_and_head_are_units_of_their_own(small_network: nn.Module, samples: torch.Tensor) -> None:
    chain = prepare(small_network, samples).chain
    assert chain.names == ("stem", "blocks.0", "blocks.1", "blocks.2", "head")
    assert inner_links(chain) == (1, 4)
    units = tile_units(chain, [(0, 2), (2, 3)])
    assert [(u.kind, u.blocks, u.start, u.stop) for u in units] == [
        ("stem", ("stem",), 0, 1),
        ("pack", ("blocks.0", "blocks.1"), 1, 3),
        ("pack", ("blocks.2",), 3, 4),
        ("head", ("head",), 4, 5),
    ]
    assert [unit.name for unit in units] == ["stem", "blocks.0..blocks.1", "blocks.2", "head"]
    assert [path for u in units for path in chain.layers_of(u.start, u.stop)] == list(chain.layers)


def test_network_without_stem_and_head(samples: torch.Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.a(x).relu())

    chain = prepare(nn.Sequential(Block(), Block()), samples).chain
    assert inner_links(chain) == (0, 2)
    assert [(u.kind, u.start, u.stop) for u in tile_units(chain, [(0, 2)])] == [("pack", 0, 2)]


def test_network_of_one_layer_is_one_pack() -> None:
    chain = prepare(nn.Sequential(nn.Linear(4, 2)), torch.randn(4, 4)).chain
    assert inner_links(chain) == (0, 1)
    assert [(u.kind, u.start, u.stop) for u in tile_units(chain, [(0, 1)])] == [("pack", 0, 1)]
