"""A limit on samples is shared exactly over processes, as every `world`-th sample is."""

import pytest

from pack_ptq.distributed import share_left


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_shares_add_up_to_the_limit(limit: int, processes: int) -> None:
    shares = [share_left(limit, rank, processes, 0) for rank in range(processes)]
    assert shares == [len(range(rank, limit, processes)) for rank in range(processes)]
    assert [share_left(limit, 0, processes, seen) for seen in range(3)] == [
        max(0, (shares[0] or 0) - n) for n in range(3)
    ]


def test_no_limit() -> None:
    assert share_left(None, 0, 1, 5) is None
