"""One reader for all endings: the same cloud from each, and a refusal that names the file."""

from pathlib import Path

import numpy as np
import pytest

from pack_ptq.datamodules.cloud_formats import READERS, read_cloud
from pack_ptq.errors import UserError

POINTS = np.random.RandomState(0).standard_normal((7, 3)).astype(np.float32)


def rows(parting: str = " ", columns: np.ndarray = POINTS) -> str:
    return "".join(parting.join(f"{value:.9g}" for value in row) + "\n" for row in columns)


def written(path: Path) -> Path:
    head = f"ply\nformat ascii 1.0\nelement vertex {len(POINTS)}\n"
    texts = {
        ".ply": f"{head}property float x\nproperty float y\nproperty float z\nend_header\n{rows()}",
        ".off": f"OFF\n{len(POINTS)} 0 0\n{rows()}",
        ".txt": rows(),
    }
    if path.suffix in texts:
        path.write_text(texts[path.suffix])
    else:
        np.savez(path, points=POINTS)
    return path


@pytest.mark.parametrize("ending", READERS)
def test_every_ending_gives_the_same_points(tmp_path: Path, ending: str) -> None:
    cloud = read_cloud(written(tmp_path / f"a{ending}"))
    np.testing.assert_array_equal(cloud.points.astype(np.float32), POINTS)
    assert (cloud.name, cloud.label, cloud.faces) == (str(tmp_path / f"a{ending}"), -1, None)


def test_ending_in_capitals(tmp_path: Path) -> None:
    written(tmp_path / "a.ply").rename(tmp_path / "b.PLY")
    assert len(read_cloud(tmp_path / "b.PLY").points) == 7


@pytest.mark.parametrize("parting", [",", " ", ", ", "\t", "  "])
def test_text_with_normals_in_any_separator(tmp_path: Path, parting: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("# x y z nx ny nz\n\n" + rows(parting, np.concatenate([POINTS, -POINTS], 1)))
    np.testing.assert_array_equal(read_cloud(path).points.astype(np.float32), POINTS)


def test_labels_of_points(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", points=POINTS, labels=np.arange(7))
    labels = read_cloud(tmp_path / "a.npz").part_labels
    assert labels is not None
    assert labels.tolist() == list(range(7))


def test_mesh(tmp_path: Path) -> None:
    (tmp_path / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    faces = read_cloud(tmp_path / "a.off").faces
    assert faces is not None
    assert faces.tolist() == [[0, 1, 2]]


def test_nan_is_read_for_later_steps_to_drop(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2 3\nnan 0 inf\n")
    assert np.isfinite(read_cloud(tmp_path / "a.txt").points).all(1).tolist() == [True, False]


@pytest.mark.parametrize("ending", READERS)
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe garbage \x80", b"PK\x03\x04 no archive", b"x y z\n"])
def test_broken_files_are_refused_by_name(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    if (ending, content) == (".txt", b""):
        assert read_cloud(path).points.shape == (0, 3)  # it is refused with the clouds that lost all their points
        return
    with pytest.raises(UserError, match=rf"a\{ending} cannot be read: \S"):
        read_cloud(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n3 4\n", r"it has 2 columns, not 3 or more \(x, y, z\)"),
        ("1 2 3\n4 5\n", "number of columns changed from 3 to 2 at row 2"),
        ("1 2 3\n4 five 6\n", "could not convert string 'five'"),
    ],
)
def test_text_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=rf"a\.txt cannot be read: .*{message}"):
        read_cloud(tmp_path / "a.txt")


def test_other_arrays_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", data=POINTS)
    with pytest.raises(UserError, match=r"cannot be read: it has the arrays \['data'\], not `points`"):
        read_cloud(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"b\.ply cannot be read: No such file"):
        read_cloud(tmp_path / "b.ply")
    (tmp_path / "c.off").mkdir()
    with pytest.raises(UserError, match=r"c\.off cannot be read: Is a directory"):
        read_cloud(tmp_path / "c.off")


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", points=np.array([{"code": 1}], dtype=object))
    with pytest.raises(UserError, match="cannot be read: Object arrays cannot be loaded"):
        read_cloud(tmp_path / "a.npz")
