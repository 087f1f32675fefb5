"""Corrupt files among good ones are found, in whichever format and however they are broken."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pack_ptq.datamodules.image_check import corrupt_files, first_readable


def noise(path: Path, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def cut(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_truncated_files_are_found_among_good_ones(tmp_path: Path, suffix: str, keep: float, thorough: bool) -> None:
    files = [(str(noise(tmp_path / f"{name}.{suffix}")), 0) for name in "abcde"]
    cut(Path(files[2][0]), keep)
    assert corrupt_files(files, thorough) == [files[2][0]]


@pytest.mark.parametrize("thorough", [True, False])
def test_text_and_missing_files_are_corrupt(tmp_path: Path, thorough: bool) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("<html>not found</html>")
    missing = tmp_path / "missing.jpg"
    assert corrupt_files([(str(text), 0), (str(missing), 0)], thorough) == [str(text), str(missing)]


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png")]
)
def test_other_colours_are_not_corrupt(tmp_path: Path, mode: str, suffix: str, thorough: bool) -> None:
    assert corrupt_files([(str(noise(tmp_path / f"image.{suffix}", mode)), 0)], thorough) == []


def test_draw_passes_over_corrupt_files_in_order(tmp_path: Path) -> None:
    files = [(str(noise(tmp_path / f"{number}.jpg")), number) for number in range(8)]
    for number in (1, 2, 4):
        cut(Path(files[number][0]), 0.5)
    taken, passed = first_readable(files, 3)
    assert [label for _, label in taken] == [0, 3, 5]
    assert passed == 3
    taken, passed = first_readable(files, 100)
    assert [label for _, label in taken] == [0, 3, 5, 6, 7]
    assert passed == 3
