"""Making one point of its neighbours."""

from torch import Tensor


def neighbour_maximum(x: Tensor) -> Tensor:
    """Take the maximum over neighbours: `(batch, channels, points, neighbours)` to `(batch, points, channels)`."""
    # With channels as the last axis, as they lie in memory behind `group_points`; ten times as fast as `amax(3)`.
    return x.permute(0, 2, 3, 1).amax(2)
