"""From a mesh to a point cloud: points drawn uniformly by area."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np


def triangulate(polygons: Iterable[Sequence[int]]) -> np.ndarray:
    """Part polygons into triangles that share their first corner; exact where they are convex.

    Args:
        polygons: Corners of each; fewer than three make no triangle.

    Returns:
        `(triangles, 3)` in int64.
    """
    fans = [(corners[0], *pair) for corners in polygons for pair in pairwise(corners[1:])]
    return np.array(fans, dtype=np.int64).reshape(-1, 3)


def sample_surface(vertices: np.ndarray, faces: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    """Draw points on a surface, each piece as likely as its share of the area.

    Args:
        vertices: `(m, 3)`; triangles with a corner that is NaN or infinite do not count.
        faces: `(f, 3)`, rows of `vertices`.
        count: Points to draw.
        random: Source of every choice.

    Returns:
        `(count, 3)` in float64.

    Raises:
        ValueError: A face names a vertex that is not there, or the surface has no area.
    """
    if len(faces) and not (faces.min() >= 0 and faces.max() < len(vertices)):
        raise ValueError(f"a face names a vertex outside 0 to {len(vertices) - 1}")
    corners = vertices[faces].astype(np.float64)
    corners = corners[np.isfinite(corners).all((1, 2))]
    scale = np.abs(corners).max(initial=0.0) or 1.0  # squares of far too large numbers would overflow
    edges = (corners[:, 1:] - corners[:, :1]) / scale
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    if not areas.sum() > 0:
        raise ValueError("its surface has no area")
    # By the cumulated area and not by `choice`, whose stream numpy does not promise for weights.
    bounds = np.cumsum(areas)
    chosen = np.minimum(np.searchsorted(bounds, random.random_sample(count) * bounds[-1], "right"), len(areas) - 1)
    along, across = random.random_sample((2, count, 1))
    root = np.sqrt(along)
    a, b, c = corners[chosen].transpose(1, 0, 2)
    return (1 - root) * a + root * (1 - across) * b + root * across * c
