import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pack_ptq.errors import UserError
from pack_ptq.models.checkpoint import load_checkpoint

STATE = {"conv.weight": torch.arange(4.0), "conv.bias": torch.ones(1)}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def message(file):
    with pytest.raises(UserError) as refusal:
        load_checkpoint(str(file))
    assert f"model.checkpoint is {str(file)!r}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "weights_only" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt", "bin", "PTH"])
def test_bare_state_dict(tmp_path, suffix):
    torch.save(STATE, tmp_path / f"a.{suffix}")
    assert equal(load_checkpoint(str(tmp_path / f"a.{suffix}")), STATE)


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "a.fp16.safetensors")
    assert equal(load_checkpoint(str(tmp_path / "a.fp16.safetensors")), STATE)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "model_ema", "net"])
def test_nested_state_dict(tmp_path, key):
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: STATE}, tmp_path / "a.pth")
    assert equal(load_checkpoint(str(tmp_path / "a.pth")), STATE)


def test_twice_nested_state_dict(tmp_path):
    torch.save({"model": {"epoch": 3, "state_dict": STATE}}, tmp_path / "a.pth")
    assert equal(load_checkpoint(str(tmp_path / "a.pth")), STATE)


def test_plain_weights_go_before_their_average(tmp_path):
    torch.save({"model_ema": {"conv.weight": torch.zeros(1)}, "model": STATE}, tmp_path / "a.pth")
    assert equal(load_checkpoint(str(tmp_path / "a.pth")), STATE)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(STATE, tmp_path / "a.pth")
    assert equal(load_checkpoint("~/a.pth"), STATE)


@pytest.mark.parametrize("name", ["a.onnx", "a", "a.npz"])
def test_unknown_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert ".safetensors, .pth, .pt, .ckpt, .bin" in message(tmp_path / name)


def test_missing_file_is_refused(tmp_path):
    assert "an existing file" in message(tmp_path / "a.pth")


def test_folder_is_refused(tmp_path):
    (tmp_path / "a.pth").mkdir()
    assert "an existing file" in message(tmp_path / "a.pth")


@pytest.mark.parametrize("kept", [0, 5, 100, 200])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_file_is_refused(tmp_path, suffix, kept):
    file = tmp_path / f"a.{suffix}"
    (torch.save if suffix == "pth" else save_file)(STATE, file)
    content = file.read_bytes()
    file.write_bytes(content[: min(kept, len(content) - 1)])
    assert "undamaged file" in message(file)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"garbage" * 30, b"<html>not found</html>", bytes(range(256)) * 8])
def test_garbage_is_refused(tmp_path, suffix, content):
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    assert "undamaged file" in message(file)


def test_pickled_objects_are_refused_by_class(tmp_path):
    torch.save({"state_dict": STATE, "folder": Path("x")}, tmp_path / "a.pth")
    text = message(tmp_path / "a.pth")
    assert "nothing but tensors" in text
    assert "pathlib" in text


def test_pickled_network_is_refused_by_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    assert "torch.nn.modules.linear.Linear" in message(tmp_path / "a.pth")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil_was_here"),)


def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for save in (torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))):
        save({"a": Evil()}, tmp_path / "a.pth")
        message(tmp_path / "a.pth")
        assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.parametrize(
    ("content", "held"),
    [({"epoch": 3}, "keys ['epoch']"), ({}, "keys []"), ([1, 2], "list"), ({"model": {}}, "keys []"), (3, "int")],
)
def test_file_without_state_dict_is_refused(tmp_path, content, held):
    torch.save(content, tmp_path / "a.pth")
    text = message(tmp_path / "a.pth")
    assert "a state dict, bare or under state_dict, model" in text
    assert f"it holds {held}" in text
