"""Vertices and faces of an .off file."""

import re
from pathlib import Path

import numpy as np

from pack_ptq.datamodules.mesh_sampling import triangulate

# Some ModelNet files lack the line break after the keyword: `OFF490 518 0`.
KEYWORD = re.compile(r"(?:ST)?C?N?OFF\s*", re.IGNORECASE)


def read_off(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the vertices' x, y, z and the faces; colours and normals go unread.

    Returns:
        Points `(m, 3)` in float64, and triangles `(f, 3)`, None without faces.

    Raises:
        ValueError: The file is no .off, or is cut short.
    """
    text = path.read_text(encoding="ascii", errors="replace")
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    keyword = KEYWORD.match(lines[0]) if lines else None
    if keyword is None:
        raise ValueError("it does not begin with OFF")
    lines[0] = lines[0][keyword.end() :]
    lines = lines if lines[0] else lines[1:]
    vertices, faces = (int(word) for word in lines[0].split()[:2])
    rows = [line.split() for line in lines[1 : 1 + vertices + faces]]
    if len(rows) < vertices + faces:
        raise ValueError(f"it is cut short: {len(rows)} of {vertices + faces} rows of vertices and faces")
    points = np.array([row[:3] for row in rows[:vertices]], np.float64).reshape(-1, 3)
    if not faces:
        return points, None
    polygons = [[int(word) for word in row[1 : 1 + int(row[0])]] for row in rows[vertices:]]
    return points, triangulate(polygons)
