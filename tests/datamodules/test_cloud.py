"""Sequences of clouds: read when asked, with their label and upward axis."""

from pathlib import Path

import numpy as np
import pytest

from pack_ptq.datamodules.cloud import Cloud, CloudArrays, CloudFiles
from pack_ptq.errors import UserError

POINTS = np.arange(24.0).reshape(2, 4, 3)


def test_files_are_read_when_asked_for() -> None:
    read = []

    def reader(path: Path) -> Cloud:
        read.append(path)
        return Cloud(str(path), POINTS[0])

    clouds = CloudFiles([(Path("a"), 3), (Path("b"), -1)], reader, up="z")
    assert (len(clouds), read) == (2, [])
    assert (clouds[1].name, clouds[1].label, clouds[1].up) == ("b", -1, "z")
    assert read == [Path("b")] * 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no number"), "a cannot be read: no number"),
        (RuntimeError(), "a cannot be read: RuntimeError"),
        (UserError("a is empty"), "a is empty"),
    ],
)
def test_what_a_reader_raises_names_the_file(error: Exception, message: str) -> None:
    def reader(path: Path) -> Cloud:
        raise error

    with pytest.raises(UserError) as refusal:
        CloudFiles([(Path("a"), 0)], reader)[0]
    assert str(refusal.value) == message


def test_arrays_name_their_place() -> None:
    clouds = CloudArrays("train.h5", POINTS, np.array([5, 6], np.uint8), up="z")
    assert len(clouds) == 2
    cloud = clouds[1]
    assert (cloud.name, cloud.label, cloud.up) == ("train.h5[1]", 6, "z")
    assert np.array_equal(cloud.points, POINTS[1])
    with pytest.raises(IndexError):
        clouds[2]
