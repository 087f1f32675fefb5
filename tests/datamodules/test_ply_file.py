""".ply files in all three formats, written by hand."""

import struct
from pathlib import Path

import numpy as np
import pytest

from pack_ptq.datamodules.ply_file import read_ply

POINTS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.5], [-2.25, 1e-3, 7]])
TRIANGLES, QUADS, MIXED = [(0, 1, 2), (2, 3, 4)], [(0, 1, 2, 3), (1, 2, 3, 4)], [(0, 1, 2), (0, 1, 2, 3), (2, 3, 4)]
FANS = {"triangles": [[0, 1, 2], [2, 3, 4]], "quads": [[0, 1, 2], [0, 2, 3], [1, 2, 3], [1, 3, 4]],
        "mixed": [[0, 1, 2], [0, 1, 2], [0, 2, 3], [2, 3, 4]]}  # fmt: skip
FACES = {"triangles": TRIANGLES, "quads": QUADS, "mixed": MIXED, "none": None, "empty": []}
FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


def written(path: Path, form: str, faces: list | None, corners: str = "vertex_indices", breaks: str = "\n") -> Path:
    """Write red before x, a camera element before the vertices, and flags after the corners of a face."""
    header = ["ply", f"format {form} 1.0", "comment made by hand", "element camera 1", "property float view",
              f"element vertex {len(POINTS)}", "property uchar red", "property float x", "property double y",
              "property float32 z"]  # fmt: skip
    if faces is not None:
        header += [f"element face {len(faces)}", f"property list uchar int {corners}", "property short flags"]
    head = breaks.join([*header, "end_header", ""]).encode()
    faces = faces or []
    if form == "ascii":
        rows = ["0.5", *[f"{i} {x!r} {y!r} {z!r}" for i, (x, y, z) in enumerate(POINTS.tolist())]]
        rows += [" ".join(str(n) for n in (len(face), *face, -1)) for face in faces]
        path.write_bytes(head + (breaks.join(rows) + breaks).encode())
    else:
        endian = FORMATS[form]
        body = struct.pack(f"{endian}f", 0.5)
        body += b"".join(struct.pack(f"{endian}Bfdf", i, *point) for i, point in enumerate(POINTS))
        body += b"".join(struct.pack(f"{endian}B{len(face)}ih", len(face), *face, -1) for face in faces)
        path.write_bytes(head + body)
    return path


@pytest.mark.parametrize("kind", FACES)
@pytest.mark.parametrize("form", FORMATS)
def test_vertices_and_faces(tmp_path: Path, form: str, kind: str) -> None:
    points, faces = read_ply(written(tmp_path / "a.ply", form, FACES[kind]))
    np.testing.assert_allclose(points, POINTS, rtol=1e-6)
    assert (None if faces is None else faces.tolist()) == FANS.get(kind)


@pytest.mark.parametrize("form", FORMATS)
def test_other_name_of_corners_and_line_breaks(tmp_path: Path, form: str) -> None:
    points, faces = read_ply(written(tmp_path / "a.ply", form, TRIANGLES, "vertex_index", "\r\n"))
    np.testing.assert_allclose(points, POINTS, rtol=1e-6)
    assert faces is not None
    assert faces.tolist() == FANS["triangles"]


@pytest.mark.parametrize("kind", ["triangles", "mixed", "none"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_cut_is_noticed(tmp_path: Path, form: str, kind: str) -> None:
    path = written(tmp_path / "a.ply", form, FACES[kind])
    whole = path.read_bytes()
    # The last value of an ascii file may lose digits without a trace.
    for length in range(0, len(whole) - 4, 3):
        path.write_bytes(whole[:length])
        with pytest.raises((ValueError, LookupError)):
            read_ply(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with a header"),
        ("solid\nend_header\n", "does not begin with a header"),
        ("ply\nformat ascii 1.0\n", "does not begin with a header"),
        ("ply\nformat base64 1.0\nend_header\n", "its format is 'base64', not one of ascii, binary_little_endian"),
        ("ply\nformat ascii 1.0\nend_header\n", "it has no vertices"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.ply").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ply(tmp_path / "a.ply")
