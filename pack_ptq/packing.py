"""Group neighbouring blocks into packs; every function gives (start, stop) pairs that tile the blocks in order."""

import random

from pack_ptq.errors import refuse
from pack_ptq.graph.chain import Chain
from pack_ptq.types import Unit

Packs = list[tuple[int, int]]


def hessian_packs(scores: list[float], max_blocks: int | None = None) -> Packs:
    """Pack blocks by their Hessian scores (METHOD P2).

    The lowest score in the scope starts the last pack; then the blocks before it are the scope. So a block starts a
    pack if and only if its score is below every earlier one.

    Args:
        scores: `S_b` per block, in execution order.
        max_blocks: A longer pack is split before its lowest inner score, until it fits.
    """
    packs: Packs = []
    end = len(scores)
    while end > 0:
        start = min(range(end), key=scores.__getitem__)
        packs.append((start, end))
        end = start
    return [part for pack in reversed(packs) for part in _split(pack, scores, max_blocks)]


def _split(pack: tuple[int, int], scores: list[float], max_blocks: int | None) -> Packs:
    start, stop = pack
    if max_blocks is None or stop - start <= max_blocks:
        return [pack]
    middle = min(range(start + 1, stop), key=scores.__getitem__)
    return [*_split((start, middle), scores, max_blocks), *_split((middle, stop), scores, max_blocks)]


def fixed_packs(num_blocks: int, size: int) -> Packs:
    """Pack every `size` blocks; the last pack may be shorter. Size 1 is no packing."""
    return [(start, min(start + size, num_blocks)) for start in range(0, num_blocks, size)]


def random_packs(num_blocks: int, seed: int, max_blocks: int | None = None) -> Packs:
    """Cut the chain between any two blocks with probability 1/2, seeded; a pack at `max_blocks` is always cut."""
    draw = random.Random(seed)
    packs: Packs = []
    start = 0
    for stop in range(1, num_blocks + 1):
        full = max_blocks is not None and stop - start >= max_blocks
        if stop == num_blocks or full or draw.random() < 0.5:
            packs.append((start, stop))
            start = stop
    return packs


def check_max_blocks(max_blocks: int | None) -> None:
    """Refuse a limit below one block.

    Raises:
        UserError: `max_blocks` is below 1.
    """
    if max_blocks is not None and max_blocks < 1:
        raise refuse("packing.init_args.max_blocks", max_blocks, "1 or more")


def inner_links(chain: Chain) -> tuple[int, int]:
    """Give the blocks of a chain as links `start..stop-1`: without a stem and a head of one layer each."""
    start, stop = 0, len(chain)
    if stop > 1 and len(chain.elements[0].layers) == 1:
        start = 1
    if stop - start > 1 and len(chain.elements[-1].layers) == 1:
        stop -= 1
    return start, stop


def tile_units(chain: Chain, packs: Packs) -> list[Unit]:
    """Give all units of a chain, in order: the stem, the packs (counted from the first block), the head."""
    first, last = inner_links(chain)
    names = chain.names
    units = [Unit("stem", names[:first], 0, first)] if first else []
    units += [Unit("pack", names[first + a : first + b], first + a, first + b) for a, b in packs]
    if last < len(chain):
        units.append(Unit("head", names[last:], last, len(chain)))
    return units
