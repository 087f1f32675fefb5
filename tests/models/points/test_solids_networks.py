"""The embedded networks for point clouds, and the script that makes their weights."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pack_ptq.datamodules import SolidsData
from pack_ptq.models import ModelSource, PointNet, PointNetSegmentation, SolidsPartNet, SolidsPointNet
from pack_ptq.models.points.solids_pointnet import PARTNET_WEIGHTS, POINTNET_WEIGHTS

SCRIPT = Path(__file__).parents[3] / "scripts" / "train_solids.py"
WEIGHTS = {SolidsPointNet: POINTNET_WEIGHTS, SolidsPartNet: PARTNET_WEIGHTS}


def scores(network: torch.nn.Module, task: str) -> dict[str, float]:
    """Give the metrics on the test clouds, in percent."""
    data = SolidsData(task, num_calibration=1)
    metrics = data.metrics()
    for start in range(0, 600, 100):
        inputs, labels = zip(*(data.test_dataset()[i] for i in range(start, start + 100)), strict=True)
        with torch.no_grad():
            output = network(torch.stack(inputs))
        data.check_output(output)
        for metric in metrics.values():
            metric.update(output, torch.stack([torch.as_tensor(label) for label in labels]))
    return {name: 100 * metric.compute().item() for name, metric in metrics.items()}


def test_shipped_weights_tell_classes():
    network = ModelSource(class_path="pack_ptq.models.SolidsPointNet").load().network
    reached = scores(network, "classification")
    assert reached["overall"] == pytest.approx(91.2, abs=0.4)
    assert reached["mean_class"] == pytest.approx(reached["overall"], abs=0.01), "as many clouds of each class"


def test_shipped_weights_tell_parts():
    network = ModelSource(class_path="pack_ptq.models.SolidsPartNet").load().network
    reached = scores(network, "parts")
    assert reached["instance_miou"] == pytest.approx(74.6, abs=0.4)
    assert reached["class_miou"] == pytest.approx(reached["instance_miou"], abs=0.01), "as many clouds of each class"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_they_are_small(kind):
    assert sum(parameter.numel() for parameter in kind().parameters()) < 250_000
    assert len(WEIGHTS[kind].read_bytes()) < 1_000_000


@pytest.mark.parametrize(("kind", "wide"), [(SolidsPointNet, PointNet), (SolidsPartNet, PointNetSegmentation)])
def test_names_are_those_of_the_wide_network(kind, wide):
    names = set(wide().state_dict())
    assert set(kind().state_dict()) == names
    assert set(load_file(str(WEIGHTS[kind]))) == names


@pytest.mark.parametrize("kind", WEIGHTS)
def test_random_weights_on_wish(kind):
    random, shipped = next(kind(pretrained=False).parameters()), next(kind().parameters())
    assert not torch.equal(random, shipped)


@pytest.mark.slow
def test_training_script_writes_two_whole_files(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "STAGES", dict.fromkeys(("classification", "parts"), ((1, 16),)))
    monkeypatch.setattr(sys, "argv", ["train", "--output_dir", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        script["main"]()
    finally:
        torch.set_num_threads(threads)
    assert {file.name for file in tmp_path.iterdir()} == {Path(str(file)).name for file in WEIGHTS.values()}
    SolidsPointNet(pretrained=False).load_state_dict(load_file(tmp_path / "solids_pointnet.safetensors"))
    SolidsPartNet(pretrained=False).load_state_dict(load_file(tmp_path / "solids_partnet.safetensors"))
    assert capsys.readouterr().out.count("test ") == 2
