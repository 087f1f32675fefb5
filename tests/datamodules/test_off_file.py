""".off files, also with the defects that ModelNet has."""

from pathlib import Path

import numpy as np
import pytest

from pack_ptq.datamodules.off_file import read_off

ROWS = "0 0 0\n1 0 0\n1 1 0\n0 1 0.5\n"
FACES = "3 0 1 2\n4 0 1 2 3\n"
POINTS = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.5]]
FANS = [[0, 1, 2], [0, 1, 2], [0, 2, 3]]


def read(folder: Path, text: str) -> tuple[np.ndarray, np.ndarray | None]:
    (folder / "a.off").write_text(text)
    return read_off(folder / "a.off")


@pytest.mark.parametrize(
    "text",
    [
        f"OFF\n4 2 0\n{ROWS}{FACES}",
        f"OFF4 2 0\n{ROWS}{FACES}",
        f"OFF 4 2 0\n{ROWS}{FACES}",
        f"off\r\n4 2 0\r\n{ROWS}{FACES}",
        f"# a comment\n\nOFF # this is it\n\n4 2 0\n\n{ROWS}# faces\n{FACES}",
        f"OFF\n4 2\n{ROWS}3 0 1 2 255 0 0\n4  0 1 2 3 0.5 0.5 0.5 1\n\n",
        "COFF\n4 2 0\n" + ROWS.replace("\n", " 255 0 0 255\n") + FACES,
        "NOFF\n4 2 0\n" + ROWS.replace("\n", " 0 0 1\n") + FACES,
    ],
)
def test_variants(tmp_path: Path, text: str) -> None:
    points, faces = read(tmp_path, text)
    assert points.tolist() == POINTS
    assert faces is not None
    assert faces.tolist() == FANS


def test_points_alone(tmp_path: Path) -> None:
    points, faces = read(tmp_path, f"OFF\n4 0 0\n{ROWS}")
    assert points.tolist() == POINTS
    assert faces is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with OFF"),
        ("ply\n", "does not begin with OFF"),
        (f"OFF\n4 2 0\n{ROWS}3 0 1 2\n", "cut short: 5 of 6 rows"),
        ("OFF\nfour 2 0\n", "invalid literal"),
        ("OFF\n1 0 0\n0 zero 0\n", "could not convert"),
        ("OFF\n2 0 0\n0 0 0\n0 0\n", "inhomogeneous"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)
