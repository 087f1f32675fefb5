import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pack_ptq.datamodules.digits import test_split as digits_test_split
from pack_ptq.models import DigitsResNet, ModelSource
from pack_ptq.models.digits_resnet import WEIGHTS

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_digits_resnet.py"


def test_shipped_weights_reach_their_accuracy():
    network = ModelSource(class_path="pack_ptq.models.DigitsResNet").load().network
    images, labels = digits_test_split()
    accuracy = 100 * (network(images).argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(99.2, abs=0.2)


def test_it_is_small():
    assert sum(parameter.numel() for parameter in DigitsResNet().parameters()) < 50_000
    assert len(WEIGHTS.read_bytes()) < 200_000


def test_random_weights_on_wish():
    assert not torch.equal(DigitsResNet(pretrained=False).conv1.weight, DigitsResNet().conv1.weight)


def test_training_script_writes_one_whole_file(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path / "a.safetensors")])
    threads = torch.get_num_threads()
    try:
        script["main"]()
    finally:
        torch.set_num_threads(threads)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    DigitsResNet(pretrained=False).load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_training_is_deterministic_and_gives_the_shipped_accuracy(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path / "a.safetensors")])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    reached = float(capsys.readouterr().out.split("test accuracy: ")[1].split()[0])
    # Other processors sum in another order, so the accuracy is held, not the bytes.
    assert reached >= 98.5
