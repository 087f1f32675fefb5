"""Run folders: whole files or none, one folder per run, resuming."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq.errors import UserError
from pack_ptq.runs import TEMPORARY, RunFolder, atomic_write, flatten

IDENTITY = {
    "config": {"recipe": {"weight": {"bits": 3}, "budget": "fast"}, "seed": 0, "data": {"mean": (0.5, 0.5)}},
    "model": "abc",
    "data": "def",
}


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@given(st.binary(max_size=200))
def test_atomic_write(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("run") / "new" / "file"
    for written in (b"old", content):
        atomic_write(path, written)
        assert path.read_bytes() == written
        assert names(path.parent) == ["file"]


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, what, no_space)
    with pytest.raises(UserError, match=r"run_dir: .*file cannot be written: No space left on device; allowed: "):
        atomic_write(path, b"new")
    with pytest.raises(UserError, match="No space left"):
        atomic_write(tmp_path / "other", b"new")
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: "):
        atomic_write(tmp_path / "file" / "below", b"")


def test_claim_writes_config_and_identity(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.claim(IDENTITY)
    assert names(folder.path) == ["config.yaml", "identity.json"]
    assert yaml.safe_load(folder.config.read_text()) == json.loads(json.dumps(IDENTITY["config"]))
    assert list(yaml.safe_load(folder.config.read_text())) == ["recipe", "seed", "data"], "the order of the settings"


def test_claim_resumes_and_clears_what_is_half_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(IDENTITY)
    folder.write_json(folder.plan, {"a": 1})
    folder.write_tensors(folder.pack(3), {"codes": torch.arange(3)})
    there = names(tmp_path)
    (tmp_path / f"{TEMPORARY}x").write_text("half")
    (tmp_path / "packs" / f"{TEMPORARY}y").write_text("half")
    RunFolder(tmp_path).claim(IDENTITY)
    assert names(tmp_path) == there
    assert folder.pack(3).name == "003.pt"
    assert torch.equal(folder.read_tensors(folder.pack(3))["codes"], torch.arange(3))


def test_empty_folder_and_one_killed_in_its_first_write_are_claimed(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}x").write_text("half")
    RunFolder(tmp_path).claim(IDENTITY)
    assert names(tmp_path) == ["config.yaml", "identity.json"]


@pytest.mark.parametrize("fails", [1, 2])
def test_claim_that_ran_out_of_space_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    left, fsync = [fails], os.fsync

    def sometimes(descriptor: int) -> None:
        left[0] -= 1
        no_space() if left[0] == 0 else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sometimes)
    with pytest.raises(UserError, match="No space left"):
        RunFolder(tmp_path).claim(IDENTITY)
    RunFolder(tmp_path).claim(IDENTITY)
    assert names(tmp_path) == ["config.yaml", "identity.json"]


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"config": {**IDENTITY["config"], "seed": 1}}, ["seed (0 there, 1 now)"]),
        (
            {"config": {**IDENTITY["config"], "recipe": {"weight": {"bits": 4}, "budget": "best"}}},
            ["recipe.weight.bits (3 there, 4 now)", "recipe.budget ('fast' there, 'best' now)"],
        ),
        ({"config": {**IDENTITY["config"], "extra": 5}}, ["extra (None there, 5 now)"]),
        ({"config": {"recipe": IDENTITY["config"]["recipe"], "seed": 0}}, ["data.mean ([0.5, 0.5] there, None now)"]),
        ({"model": "other"}, ["model (other weights)"]),
        ({"data": "other"}, ["data (other samples)"]),
    ],
)
def test_folder_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], differing: list[str]) -> None:
    RunFolder(tmp_path).claim(IDENTITY)
    (tmp_path / f"{TEMPORARY}x").write_text("of the other run, perhaps alive")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).claim({**IDENTITY, **change})
    message = str(caught.value)
    assert f"a folder of another run: {', '.join(differing)}; allowed: " in message
    assert str(tmp_path) in message
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="which holds files of something else; allowed: a new or empty folder"):
        RunFolder(tmp_path).claim(IDENTITY)
    assert names(tmp_path) == ["thesis.tex"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"run_dir is '.*file'.*; allowed: "):
        RunFolder(tmp_path / "file").claim(IDENTITY)
    assert (tmp_path / "file").read_text() == "mine"


def test_flatten() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": {}, "g": None}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": {}, "g": None}


def test_tensors_load_with_weights_only(tmp_path: Path) -> None:
    content = {"a": torch.randn(3), "b": None, "c": [1, 2.5, "x", True], "d": {"e": torch.ones(2, dtype=torch.int8)}}
    RunFolder.write_tensors(tmp_path / "x.pt", content)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["c"] == content["c"]
    assert torch.equal(found["a"], content["a"])
    assert torch.equal(found["d"]["e"], content["d"]["e"])


def test_a_folder_without_a_decision_can_be_given_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim({"config": {"a": 1}, "model": "m", "data": "d"})
    folder.release()
    folder.claim({"config": {"a": 2}, "model": "m", "data": "d"})
    folder.write_json(folder.plan, {})
    folder.release()
    with pytest.raises(UserError, match="a folder of another run: a"):
        folder.claim({"config": {"a": 3}, "model": "m", "data": "d"})
