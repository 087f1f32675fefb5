"""Surfaces with a known area, of which points can be drawn uniformly: what the embedded solids are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pack_ptq.datamodules.mesh_sampling import sample_surface, triangulate

Random = np.random.RandomState
TURN = 2 * np.pi
GRID = 257


@dataclass(frozen=True)
class Surface:
    """A piece of a solid.

    Attributes:
        area: In units squared, by which pieces share the points of a cloud.
        draw: Gives `(n, 3)` points uniform by area, y up, from n and a source of choices.
        part: Part of its class that it belongs to.
    """

    area: float
    draw: Callable[[int, Random], np.ndarray]
    part: int = 0

    def at(self, x: float = 0.0, y: float = 0.0, z: float = 0.0, part: int | None = None) -> "Surface":
        """Give the surface moved, and as another part if one is named."""
        offset = np.array([x, y, z])
        return Surface(self.area, lambda n, r: self.draw(n, r) + offset, self.part if part is None else part)


def polygons(corners: Sequence[Sequence[float]], faces: Sequence[Sequence[int]], part: int = 0) -> Surface:
    """Give a surface of flat convex faces.

    Args:
        corners: x, y, z of each.
        faces: Corners of each face, in order round it.
        part: Part of its class.
    """
    vertices, triangles = np.array(corners, np.float64), triangulate(faces)
    a, b, c = vertices[triangles].transpose(1, 0, 2)
    area = float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)
    return Surface(area, lambda n, r: sample_surface(vertices, triangles, n, r), part)


def box(width: float, height: float, depth: float, part: int = 0) -> Surface:
    """Give a closed box along x, y, z, centred at the origin."""
    signs = [(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]
    corners = [(x * width, y * height, z * depth) for x, y, z in signs]
    faces = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    return polygons(corners, faces, part)


def frustum(bottom: float, top: float, height: float, part: int = 0) -> Surface:
    """Give the open side of a truncated cone about y from -height / 2 up; equal radii make a cylinder."""
    area = np.pi * (bottom + top) * float(np.hypot(height, bottom - top))

    def draw(count: int, random: Random) -> np.ndarray:
        share, angle = random.random_sample((2, count))
        radius = np.sqrt(bottom**2 + share * (top**2 - bottom**2))
        level = share if bottom == top else (radius - bottom) / (top - bottom)
        return _round(radius, (level - 0.5) * height, angle)

    return Surface(area, draw, part)


def ring(inner: float, outer: float, part: int = 0) -> Surface:
    """Give a flat ring about y in the plane y = 0; an inner radius of 0 makes a disk."""

    def draw(count: int, random: Random) -> np.ndarray:
        share, angle = random.random_sample((2, count))
        return _round(np.sqrt(inner**2 + share * (outer**2 - inner**2)), np.zeros(count), angle)

    return Surface(np.pi * (outer**2 - inner**2), draw, part)


def sphere(radius: float, low: float = -1.0, high: float = 1.0, part: int = 0) -> Surface:
    """Give the zone of a sphere between two levels of y, as shares of its radius from -1 to 1."""

    def draw(count: int, random: Random) -> np.ndarray:
        share, angle = random.random_sample((2, count))
        level = low + share * (high - low)  # the area of a zone goes with its height
        return _round(radius * np.sqrt(np.maximum(1 - level**2, 0)), radius * level, angle)

    return Surface(TURN * radius**2 * (high - low), draw, part)


def torus(radius: float, tube: float, turn: float = 1.0, part: int = 0) -> Surface:
    """Give the surface of a ring in the plane of x and y, from -turn / 2 to turn / 2 about the direction of x.

    Args:
        radius: From the middle to the middle of the tube.
        tube: Radius of the tube, below `radius`.
        turn: Share of the whole ring, above 0 up to 1.
        part: Part of its class.
    """
    angles = np.linspace(0, TURN, GRID)
    cumulated = (radius * angles + tube * np.sin(angles)) / (TURN * radius)

    def draw(count: int, random: Random) -> np.ndarray:
        share, around = random.random_sample((2, count))
        across, along = np.interp(share, cumulated, angles), (around - 0.5) * turn * TURN
        out = radius + tube * np.cos(across)
        return np.stack([out * np.cos(along), out * np.sin(along), tube * np.sin(across)], 1)

    return Surface(turn * TURN**2 * radius * tube, draw, part)


def _round(radius: np.ndarray, level: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(TURN * angle), level, radius * np.sin(TURN * angle)], 1)
