"""Which points of a cloud a network sees."""

from typing import Literal

import numpy as np
import torch

PointSampling = Literal["first", "random", "farthest"]


def choose_points(points: np.ndarray, count: int, how: PointSampling, random: np.random.RandomState) -> np.ndarray:
    """Choose points; a cloud with fewer gives all of them, and some again.

    Args:
        points: `(m, 3)`, with 1 or more.
        count: Points to choose, 1 or more.
        how: The first ones, a draw without replacement, or farthest-point sampling from a random start.
        random: Source of every choice.

    Returns:
        Rows `(count,)` of `points`.
    """
    have = len(points)
    if have < count:
        rounds = [random.permutation(have) for _ in range(-(-count // have) - 1)]
        return np.concatenate([np.arange(have), *rounds])[:count]
    if how == "first":
        return np.arange(count)
    if how == "random":
        return random.permutation(have)[:count]
    # Late, for the point networks are a heavy import that only this choice needs.
    from pack_ptq.models.points.farthest_point_sampling import farthest_point_sampling

    batch = torch.from_numpy(points.astype(np.float32))[None]
    return farthest_point_sampling(batch, count, start=int(random.randint(have)))[0].numpy()
