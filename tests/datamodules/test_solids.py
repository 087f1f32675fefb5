"""The embedded solids: fixed, disjoint, with a part for every point."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from pack_ptq.datamodules import SolidsData
from pack_ptq.datamodules.solids import FIRST_PART, NAMES, PARTS, TRAIN_SIZE, solids
from pack_ptq.describe import describe
from pack_ptq.errors import UserError

TRAIN = [1986892.664, 9904121841.3, 35043542]
TEST = [599439.777, 2970321662.1, 10510745]


def summary(split: Any) -> list[float]:
    """Sum with changing weights, since the last digit of a cosine is the machine's own and rules a digest out."""
    points = np.stack([cloud.points for cloud in solids(split)]).astype(np.float64).flatten()
    parts = sum(int(cloud.part_labels.sum()) for cloud in solids(split))  # type: ignore[union-attr]
    return [float(np.abs(points).sum()), float(np.abs(points) @ (np.arange(len(points)) % 9973)), parts]


def test_making_them_takes_seconds() -> None:
    solids.cache_clear()
    began = time.process_time()
    assert (len(solids("train")), len(solids("test"))) == (2000, 600)
    assert time.process_time() - began < 20
    assert solids("train") is solids("train")


def test_sizes_balance_and_form() -> None:
    for split, count in (("train", 100), ("test", 30)):
        clouds = solids(split)  # type: ignore[arg-type]
        assert np.bincount([cloud.label for cloud in clouds]).tolist() == [count] * 20
        for cloud in clouds:
            assert (cloud.points.shape, cloud.points.dtype) == ((1024, 3), np.float32)
            assert np.isfinite(cloud.points).all()
            assert 0.6 < np.linalg.norm(cloud.points, axis=1).max() < 2


def test_parts_are_the_classes_own_and_nearly_all_are_seen() -> None:
    present = {cloud.name: set(cloud.part_labels.tolist()) for cloud in solids("train")}  # type: ignore[union-attr]
    for cloud in solids("train"):
        first = FIRST_PART[NAMES[cloud.label]]
        assert present[cloud.name] <= set(range(first, first + PARTS[NAMES[cloud.label]]))
    assert set().union(*present.values()) == set(range(sum(PARTS.values())))


def test_no_cloud_is_there_twice() -> None:
    seen = {cloud.points.tobytes() for split in ("train", "test") for cloud in solids(split)}  # type: ignore[arg-type]
    assert len(seen) == 2600


def test_solids_are_frozen() -> None:
    # Shipped weights may be trained on them: a change of these sums needs new weights.
    assert summary("train") == pytest.approx(TRAIN, rel=1e-6)
    assert summary("test") == pytest.approx(TEST, rel=1e-6)


def test_classification() -> None:
    data = SolidsData(num_calibration=64)
    data.check()
    points, label = data.test_dataset()[599]
    assert (tuple(points.shape), points.dtype, label) == ((1024, 3), torch.float32, 19)
    assert points.norm(dim=1).max().item() == pytest.approx(1, abs=1e-5)
    assert set(data.metrics()) == {"overall", "mean_class"}
    data.check_output(torch.zeros(2, 20))
    assert data.augments


def test_parts() -> None:
    data = SolidsData("parts", num_points=256, num_calibration=64)
    data.check()
    points, parts = data.test_dataset()[599]
    assert (tuple(points.shape), tuple(parts.shape)) == ((256, 23), (256,))
    assert points[:, 3:].argmax(1).unique().tolist() == [19]
    assert set(data.metrics()) == {"instance_miou", "class_miou"}
    data.check_output(torch.zeros(2, 256, sum(PARTS.values())))


def test_calibration_is_a_seeded_draw() -> None:
    first, again, other = (SolidsData(num_calibration=40, calibration_seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert SolidsData(**describe(first)["init_args"]).fingerprint() == first.fingerprint()
    assert len({label for _, label in first.calibration_dataset()}) > 10


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("task", "detection", "classification, parts"),
        ("num_points", 1025, "1 to 1024"),
        ("num_points", 0, "1 to 1024"),
        ("num_calibration", 0, f"1 to {TRAIN_SIZE}, or null for all"),
        ("num_calibration", TRAIN_SIZE + 1, f"1 to {TRAIN_SIZE}, or null for all"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError) as refusal:
        SolidsData(**{key: value})
    assert str(refusal.value) == f"data.init_args.{key} is {value!r}; allowed: {allowed}"


def test_networks_for_something_else_are_refused() -> None:
    with pytest.raises(UserError, match="40 scores per sample; allowed: 20"):
        SolidsData().check_output(torch.zeros(2, 40))
    with pytest.raises(UserError, match=r"allowed for parts: \(batch, points, parts\), which is \(batch, 1024, 40\)"):
        SolidsData("parts").check_output(torch.zeros(2, 1024, 50))
