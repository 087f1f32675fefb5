"""Vertices and faces of a .ply file, ascii or binary."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pack_ptq.datamodules.mesh_sampling import triangulate

ENDIANS = {"binary_little_endian": "<", "binary_big_endian": ">"}
TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
         "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
         "float32": "f4", "float64": "f8"}  # fmt: skip
CORNERS = ("vertex_indices", "vertex_index")


@dataclass
class Element:
    """One kind of rows: its name, how many there are, and their properties.

    Attributes:
        properties: Name, type, and for lists the type of their length.
    """

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)

    @property
    def has_lists(self) -> bool:
        """Whether rows differ in length."""
        return any(length for _, _, length in self.properties)


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the vertices' x, y, z and the faces; what else there is goes unread.

    Returns:
        Points `(m, 3)` in float64, and triangles `(f, 3)`, None without faces.

    Raises:
        ValueError: The file is no .ply, is cut short, or its vertices have no x, y, z.
    """
    content = path.read_bytes()
    form, elements, start = _header(content)
    rows = _text_rows(content[start:], elements) if form == "ascii" else _bytes_rows(content, start, form, elements)
    points, faces = None, None
    for element, columns in rows:
        if element.name == "vertex":
            points = np.stack([np.asarray(columns[axis], np.float64) for axis in "xyz"], 1)
        elif element.name == "face" and element.count:
            faces = triangulate(next(columns[name] for name in CORNERS if name in columns))
    if points is None:
        raise ValueError("it has no vertices")
    return points, faces


def _header(content: bytes) -> tuple[str, list[Element], int]:
    head, end, _ = content.partition(b"end_header")
    lines = head.decode("ascii", "replace").split("\n")
    if lines[0].strip() != "ply" or not end:
        raise ValueError("it does not begin with a header of .ply")
    form, elements = "", []
    for words in (line.split() for line in lines[1:]):
        if words[:1] == ["format"]:
            form = words[1]
        elif words[:1] == ["element"]:
            elements.append(Element(words[1], int(words[2])))
        elif words[:2] == ["property", "list"]:
            elements[-1].properties.append((words[4], TYPES[words[3]], TYPES[words[2]]))
        elif words[:1] == ["property"]:
            elements[-1].properties.append((words[2], TYPES[words[1]], None))
    if form != "ascii" and form not in ENDIANS:
        raise ValueError(f"its format is {form!r}, not one of ascii, {', '.join(ENDIANS)}")
    return form, elements, content.index(b"\n", len(head)) + 1


def _text_rows(body: bytes, elements: list[Element]) -> Iterator[tuple[Element, dict]]:
    lines = [line.split() for line in body.splitlines() if line.strip()]
    for element in elements:
        mine, lines = lines[: element.count], lines[element.count :]
        if len(mine) < element.count:
            raise ValueError(f"it is cut short: {len(mine)} of {element.count} rows of {element.name}")
        yield element, _columns(element, mine)


def _columns(element: Element, rows: list[list[bytes]]) -> dict:
    columns: dict[str, list] = {name: [] for name, _, _ in element.properties}
    for row in rows:
        place = 0
        for name, _, length in element.properties:
            size = int(row[place]) if length else 1
            place += bool(length)
            values = row[place : place + size]
            if len(values) < size:
                raise ValueError(f"a row of {element.name} is cut short")
            columns[name].append([int(value) for value in values] if length else float(values[0]))
            place += size
    return columns


def _bytes_rows(content: bytes, start: int, form: str, elements: list[Element]) -> Iterator[tuple[Element, dict]]:
    for element in elements:
        kind = _row_type(element, ENDIANS[form], content, start)
        end = start + kind.itemsize * element.count
        table = np.frombuffer(content[start:end], kind, min(element.count, (len(content) - start) // kind.itemsize))
        if all(
            (table[f"{name} size"] == kind[name].shape[0]).all() for name, _, length in element.properties if length
        ):
            if len(table) < element.count:
                raise ValueError(f"it is cut short: {len(table)} of {element.count} rows of {element.name}")
            yield element, {name: table[name] for name, _, _ in element.properties}
            start = end
        else:
            columns, start = _ragged(element, ENDIANS[form], content, start)
            yield element, columns


def _row_type(element: Element, endian: str, content: bytes, start: int) -> np.dtype:
    """Give the type of the element's rows if all lists are as long as those of its first row."""
    fields: list[tuple] = []
    for name, value, length in element.properties:
        if length:
            here = start + np.dtype(fields).itemsize
            size = int(np.frombuffer(content, endian + length, 1, here)[0]) if element.count else 0
            fields += [(f"{name} size", endian + length), (name, endian + value, (size,))]
        else:
            fields.append((name, endian + value))
    return np.dtype(fields)


def _ragged(element: Element, endian: str, content: bytes, start: int) -> tuple[dict, int]:
    columns: dict[str, list] = {name: [] for name, _, _ in element.properties}
    for _ in range(element.count):
        row = np.frombuffer(content, _row_type(element, endian, content, start), 1, start)
        for name in columns:
            columns[name].append(row[name][0])
        start += row.itemsize
    return columns, start
