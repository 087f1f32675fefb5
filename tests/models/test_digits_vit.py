import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from pack_ptq.datamodules.digits import test_split as digits_test_split
from pack_ptq.models import DigitsViT, ModelSource
from pack_ptq.models.digits_vit import WEIGHTS

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_digits_vit.py"


def test_shipped_weights_reach_their_accuracy():
    network = ModelSource(class_path="pack_ptq.models.DigitsViT").load().network
    images, labels = digits_test_split()
    scores = network(images)
    assert scores.shape == (500, 10)
    assert 100 * (scores.argmax(1) == labels).double().mean().item() == pytest.approx(98.8, abs=0.2)


def test_it_is_small():
    assert sum(parameter.numel() for parameter in DigitsViT().parameters()) < 230_000
    assert len(WEIGHTS.read_bytes()) < 1_000_000


def test_names_are_those_of_timm():
    network = DigitsViT()
    of_timm = VisionTransformer(8, 2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2)
    shapes = {name: value.shape for name, value in of_timm.state_dict().items()}
    assert {name: value.shape for name, value in network.state_dict().items()} == shapes
    assert {name: value.shape for name, value in load_file(str(WEIGHTS)).items()} == shapes
    assert {f"blocks.{i}" for i in range(4)} <= dict(network.named_modules()).keys()


def test_random_weights_on_wish():
    assert not torch.equal(DigitsViT(pretrained=False).pos_embed, DigitsViT().pos_embed)


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
    DigitsViT(pretrained=False).load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_training_gives_the_shipped_accuracy(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path / "a.safetensors")])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    reached = float(capsys.readouterr().out.split("test accuracy: ")[1].split()[0])
    # Other processors sum in another order, so the accuracy is held, not the bytes.
    assert reached >= 98.0
