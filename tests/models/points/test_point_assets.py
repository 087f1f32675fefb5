import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pack_ptq.errors import UserError
from pack_ptq.models import DensePoint, ModelSource
from pack_ptq.models.points.farthest_point_sampling import farthest_point_sampling
from pack_ptq.models.points.gathering import gather_points

DEFAULT = Path(__file__).parents[3] / ".." / "shared" / "assets"
ASSETS = Path(os.environ.get("PACK_PTQ_ASSETS", DEFAULT)).resolve()

pytestmark = pytest.mark.skipif(not (ASSETS / "pointclouds").is_dir(), reason="needs the assets (PACK_PTQ_ASSETS)")


def load(name: str, **init_args):
    file = str(ASSETS / "models" / f"{name.lower()}_modelnet40.safetensors")
    return ModelSource(class_path=f"pack_ptq.models.{name}", init_args=init_args, checkpoint=file).load().network


def top1(network, prepare, step: int = 1) -> float:
    """Percent over every step-th of the 214 labelled objects, which are centred in the unit sphere already."""
    data = np.load(ASSETS / "pointclouds" / "shapes_test.npz")
    points, labels = torch.tensor(data["points"][::step]), torch.tensor(data["labels"][::step])
    with torch.no_grad():
        predicted = torch.cat([network(prepare(batch)).argmax(1) for batch in points.split(8)])
    return 100 * (predicted == labels).double().mean().item()


def first(points):
    return points[:, :1024]


def farthest(points):
    return gather_points(points, farthest_point_sampling(points, 1024))


def test_pointnet():
    assert top1(load("PointNet"), first) == pytest.approx(62.15, abs=0.6)


def test_densepoint_on_every_tenth_object():
    assert top1(load("DensePoint"), farthest, step=10) >= 60


@pytest.mark.slow
def test_densepoint():
    assert top1(load("DensePoint"), farthest) == pytest.approx(70.56, abs=1.5)


@pytest.mark.parametrize("name", ["PointNet", "DensePoint"])
def test_weights_of_other_classes_are_refused(name):
    with pytest.raises(UserError, match=r"_modelnet40.safetensors'; allowed: weights of this very network.*2 "):
        load(name, num_classes=10)


def test_own_weights_load_too():
    network = load("DensePoint")
    again = DensePoint()
    again.load_state_dict(network.state_dict())
    assert all(torch.equal(again.state_dict()[key], value) for key, value in network.state_dict().items())
