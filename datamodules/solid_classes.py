"""The classes of the embedded solids: how each is built, with sizes drawn at random."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from pack_ptq.datamodules.solid_surfaces import Random, Surface, box, frustum, polygons, ring, sphere, torus

Build: TypeAlias = Callable[[Random], list[Surface]]
SOLIDS: dict[str, tuple[int, Build]] = {}


def _solid(parts: int) -> Callable[[Build], Build]:
    """Add a class by its function's name, with its number of parts."""

    def add(build: Build) -> Build:
        SOLIDS[build.__name__.strip("_")] = (parts, build)
        return build

    return add


def _sizes(random: Random, *ranges: tuple[float, float]) -> list[float]:
    return [float(random.uniform(*limits)) for limits in ranges]


def _closed(bottom: float, top: float, height: float, side: int, ends: int) -> list[Surface]:
    """Give a truncated cone with its disks."""
    disks = [
        ring(0, radius, ends).at(y=level) for radius, level in ((bottom, -height / 2), (top, height / 2)) if radius
    ]
    return [frustum(bottom, top, height, side), *disks]


def _pillars(width: float, depth: float, length: float, thick: float, part: int) -> list[Surface]:
    """Give four legs whose upper ends are at y = 0."""
    return [box(thick, length, thick, part).at(x * width / 2, -length / 2, z * depth / 2)
            for x in (-1, 1) for z in (-1, 1)]  # fmt: skip


@_solid(1)
def _sphere(random: Random) -> list[Surface]:
    return [sphere(1.0)]


@_solid(1)
def _box(random: Random) -> list[Surface]:
    return [box(*_sizes(random, (0.6, 2), (0.6, 2), (0.6, 2)))]


@_solid(2)
def _cylinder(random: Random) -> list[Surface]:
    radius, height = _sizes(random, (0.4, 0.9), (0.8, 2.2))
    return _closed(radius, radius, height, 0, 1)


@_solid(2)
def _cone(random: Random) -> list[Surface]:
    radius, tip, height = _sizes(random, (0.5, 1), (0, 0.12), (1, 2.2))
    return _closed(radius, tip, height, 0, 1)


@_solid(1)
def _torus(random: Random) -> list[Surface]:
    return [torus(1.0, *_sizes(random, (0.15, 0.5)))]


@_solid(2)
def _pyramid(random: Random) -> list[Surface]:
    width, depth, height = _sizes(random, (0.8, 1.8), (0.8, 1.8), (0.8, 2))
    x, z = width / 2, depth / 2
    corners = [(-x, 0, -z), (x, 0, -z), (x, 0, z), (-x, 0, z), (0, height, 0)]
    return [polygons(corners, [(0, 1, 4), (1, 2, 4), (2, 3, 4), (3, 0, 4)]), polygons(corners, [(0, 1, 2, 3)], 1)]


@_solid(2)
def _tetrahedron(random: Random) -> list[Surface]:
    (height,) = _sizes(random, (1, 1.8))
    corners = [*[(np.cos(a), 0, np.sin(a)) for a in np.arange(3) * 2 * np.pi / 3], (0, height, 0)]
    return [polygons(corners, [(0, 1, 3), (1, 2, 3), (2, 0, 3)]), polygons(corners, [(0, 1, 2)], 1)]


@_solid(2)
def _octahedron(random: Random) -> list[Surface]:
    width, height = _sizes(random, (0.8, 1.2), (0.8, 1.5))
    corners = [(width, 0, 0), (0, 0, width), (-width, 0, 0), (0, 0, -width), (0, height, 0), (0, -height, 0)]
    halves = [[(i, (i + 1) % 4, tip) for i in range(4)] for tip in (4, 5)]
    return [polygons(corners, half, part) for part, half in enumerate(halves)]


@_solid(2)
def _capsule(random: Random) -> list[Surface]:
    radius, height = _sizes(random, (0.35, 0.7), (0.5, 1.6))
    ends = [sphere(radius, 0, 1, 1).at(y=height / 2), sphere(radius, -1, 0, 1).at(y=-height / 2)]
    return [frustum(radius, radius, height), *ends]


@_solid(2)
def _tube(random: Random) -> list[Surface]:
    radius, share, height = _sizes(random, (0.4, 0.9), (0.5, 0.85), (0.6, 2.2))
    rims = [ring(share * radius, radius).at(y=level) for level in (-height / 2, height / 2)]
    return [frustum(radius, radius, height), *rims, frustum(share * radius, share * radius, height, 1)]


@_solid(2)
def _dome(random: Random) -> list[Surface]:
    return [sphere(1.0, 0, 1), ring(0, 1, 1)]


@_solid(2)
def _wedge(random: Random) -> list[Surface]:
    width, height, depth = _sizes(random, (0.8, 2), (0.6, 1.6), (0.6, 1.6))
    corners = [(0, 0, 0), (width, 0, 0), (0, height, 0), (0, 0, depth), (width, 0, depth), (0, height, depth)]
    rest = [(0, 1, 2), (3, 4, 5), (0, 1, 4, 3), (0, 2, 5, 3)]
    return [polygons(corners, [(1, 2, 5, 4)]), polygons(corners, rest, 1)]


@_solid(2)
def _angle(random: Random) -> list[Surface]:
    long, short, thick, depth = _sizes(random, (1.4, 2.2), (0.7, 1.6), (0.25, 0.5), (0.4, 1.0))
    upright, foot = box(thick, long, depth), box(short, thick, depth, 1)
    return [upright, foot.at((thick + short) / 2, (thick - long) / 2)]


@_solid(2)
def _cross(random: Random) -> list[Surface]:
    height, width, thick, level = _sizes(random, (1.6, 2.2), (0.9, 1.8), (0.2, 0.4), (-0.1, 0.3))
    arm = box((width - thick) / 2, thick, thick, 1)
    return [box(thick, height, thick), *[arm.at(side * (width + thick) / 4, level * height) for side in (-1, 1)]]


@_solid(2)
def _table(random: Random) -> list[Surface]:
    width, depth, length, thick = _sizes(random, (1.2, 2.2), (0.8, 1.6), (0.6, 1.2), (0.06, 0.16))
    top = box(width, thick, depth).at(y=thick / 2)
    return [top, *_pillars(width - 2 * thick, depth - 2 * thick, length, thick, 1)]


@_solid(3)
def _chair(random: Random) -> list[Surface]:
    width, length, back, thick = _sizes(random, (0.8, 1.2), (0.6, 1.0), (0.7, 1.3), (0.08, 0.16))
    seat, rest = box(width, thick, width).at(y=thick / 2), box(width, back, thick, 1)
    legs = _pillars(width - thick, width - thick, length, thick, 2)
    return [seat, rest.at(y=thick + back / 2, z=(thick - width) / 2), *legs]


@_solid(2)
def _mug(random: Random) -> list[Surface]:
    radius, height, handle = _sizes(random, (0.5, 0.8), (1.0, 1.6), (0.25, 0.45))
    body = [
        frustum(radius, radius, height),
        frustum(0.9 * radius, 0.9 * radius, height),
        ring(0, radius).at(y=-height / 2),
    ]
    return [*body, torus(handle, 0.08, turn=0.5, part=1).at(x=radius)]


@_solid(3)
def _lamp(random: Random) -> list[Surface]:
    base, height, wide, narrow = _sizes(random, (0.35, 0.6), (1.0, 1.8), (0.5, 0.8), (0.2, 0.4))
    pole, shade = frustum(0.06, 0.06, height, 1), frustum(wide, narrow, 0.7, 2).at(y=height / 2)
    return [*[piece.at(y=-height / 2) for piece in _closed(base, base, 0.12, 0, 0)], pole, shade]


@_solid(3)
def _bottle(random: Random) -> list[Surface]:
    radius, height, neck, share = _sizes(random, (0.4, 0.6), (1.0, 1.6), (0.4, 0.7), (0.25, 0.5))
    shoulder, narrow = 0.25, share * radius
    top = height / 2 + shoulder
    neck_pieces = [frustum(narrow, narrow, neck, 2).at(y=top + neck / 2), ring(0, narrow, 2).at(y=top + neck)]
    body = [frustum(radius, radius, height), ring(0, radius).at(y=-height / 2)]
    return [*body, frustum(radius, narrow, shoulder, 1).at(y=height / 2 + shoulder / 2), *neck_pieces]


@_solid(2)
def _mushroom(random: Random) -> list[Surface]:
    cap, stem, height = _sizes(random, (0.7, 1.0), (0.15, 0.35), (0.7, 1.4))
    pieces = [sphere(cap, 0, 1), ring(stem, cap), frustum(stem, stem, height, 1).at(y=-height / 2)]
    return [*pieces, ring(0, stem, 1).at(y=-height)]
