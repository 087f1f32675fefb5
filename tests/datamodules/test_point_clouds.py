"""The base of point-cloud data, by the smallest plug-in there can be."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from pack_ptq.api import prepare_for
from pack_ptq.datamodules import ClassLabels, Cloud, CloudArrays, PartLabels, PointCloudData
from pack_ptq.describe import describe
from pack_ptq.errors import UserError

RANDOM = np.random.RandomState(0)
TRAIN, TEST = RANDOM.standard_normal((30, 20, 3)), RANDOM.standard_normal((9, 20, 3))
LABELS = np.arange(30) % 3


class Bolts(PointCloudData):
    """Three classes, in memory."""

    labels = ClassLabels(["bolt", "nut", "washer"])  # type: ignore[assignment]
    train, train_labels, test, test_labels = TRAIN, LABELS, TEST, LABELS[:9]

    def calibration_clouds(self) -> Sequence[Cloud]:
        return CloudArrays("train", self.train, self.train_labels)

    def test_clouds(self) -> Sequence[Cloud]:
        return CloudArrays("test", self.test, self.test_labels)


class Parts(Bolts):
    """A part for every point."""

    labels = PartLabels({"bolt": 2, "nut": 1})  # type: ignore[assignment]

    def calibration_clouds(self) -> Sequence[Cloud]:
        parts = np.arange(20) % 2
        return [Cloud(f"train {i}", points, label=0, part_labels=parts) for i, points in enumerate(TRAIN)]

    def test_clouds(self) -> Sequence[Cloud]:
        return self.calibration_clouds()[:4]


def make(**settings: Any) -> Bolts:
    settings = {"num_points": 16, "num_calibration": 12, "batch_size": 4, "normalize": "none"} | settings
    return Bolts(**settings)


def inputs(data: PointCloudData) -> torch.Tensor:
    return torch.cat([batch for batch, _ in data.val_dataloader()])


def broken(*places: int) -> np.ndarray:
    points = TRAIN.copy()
    points[list(places)] = np.nan
    return points


def test_batches() -> None:
    data = make()
    data.check()
    batches = list(data.test_dataloader())
    assert [tuple(batch.shape) for batch, _ in batches] == [(4, 16, 3), (4, 16, 3), (1, 16, 3)]
    np.testing.assert_array_equal(torch.cat([b for b, _ in batches]).numpy(), TEST[:, :16].astype(np.float32))
    labels = torch.cat([labels for _, labels in batches])
    assert (labels.dtype, labels.tolist()) == (torch.int64, LABELS[:9].tolist())
    data.check_output(torch.zeros(2, 3))
    assert set(data.metrics()) == {"overall", "mean_class"}
    assert data.task_loss(torch.zeros(4, 3), labels[:4]).shape == (4,)


def test_part_batches() -> None:
    data = Parts(num_points=16, num_calibration=8, batch_size=4)
    data.check()
    points, parts = next(iter(data.val_dataloader()))
    assert (tuple(points.shape), tuple(parts.shape), parts.dtype) == ((4, 16, 5), (4, 16), torch.int64)
    assert points[..., 3:].unique(dim=1).tolist() == [[[1, 0]]] * 4
    assert parts[0].tolist() == [0, 1] * 8
    data.check_output(torch.zeros(2, 16, 3))
    assert set(data.metrics()) == {"instance_miou", "class_miou"}
    view = data.augment(points, torch.Generator().manual_seed(0))
    assert torch.equal(view[..., 3:], points[..., 3:])
    assert not torch.equal(view, points)


class Scores(torch.nn.Module):
    """Scores of three parts as `(batch, n, parts)`, or as `(batch, parts, n)`."""

    def __init__(self, points_last: bool) -> None:
        super().__init__()
        self.layer, self.points_last = torch.nn.Linear(5, 3), points_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.layer(x)
        return scores.transpose(1, 2) if self.points_last else scores


def test_scores_whose_parts_are_not_last_are_refused_before_work_starts() -> None:
    data = Parts(num_points=16, num_calibration=8, batch_size=4)
    prepare_for(Scores(points_last=False), data)
    with pytest.raises(UserError, match=r"output is \(2, 3, 16\); allowed .*\(batch, 16, 3\); `transpose\(1, 2\)`"):
        prepare_for(Scores(points_last=True), data)


def test_calibration_is_a_seeded_draw_that_only_grows() -> None:
    first = inputs(make())
    assert torch.equal(first, inputs(make()))
    assert torch.equal(first[:5], inputs(make(num_calibration=5)))
    assert not torch.equal(first, inputs(make(calibration_seed=1)))
    everything = inputs(make(num_calibration=None))
    assert len(everything) == 30
    assert len(everything.unique(dim=0)) == 30


def test_a_cloud_keeps_its_points_whatever_is_drawn() -> None:
    few, all_of_them = (inputs(make(sampling="random", num_calibration=n)) for n in (5, None))
    assert all((cloud == all_of_them).all(2).all(1).sum() == 1 for cloud in few)


def test_workers_prepare_the_same_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    alone, helped = make(sampling="random"), make(sampling="random", num_workers=2)
    assert alone.fingerprint() == helped.fingerprint()
    assert torch.equal(state, torch.get_rng_state())


def test_clouds_that_cannot_serve_are_all_named_before_work_starts() -> None:
    for workers in (0, 1):
        data = make(num_calibration=None, num_workers=workers)
        data.train = broken(3, 7)
        with pytest.raises(UserError) as refusal:
            data.check()
        message = str(refusal.value)
        assert message.startswith("data has 2 calibration clouds of 30 that cannot serve: train[")
        for place in (3, 7):
            assert f"train[{place}] has 20 points, none finite" in message
        assert message.endswith("repair them, or --data.init_args.on_corrupt skip leaves them out")


def test_skipping_draws_others() -> None:
    data = make(on_corrupt="skip")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    data.train = broken(order[0], order[5], order[12])
    with pytest.warns(UserWarning, match="data has 3 calibration clouds of 15 that cannot serve and are left out"):
        data.check()
    kept = [place for place in order if place not in (order[0], order[5], order[12])][:12]
    np.testing.assert_array_equal(inputs(data).numpy(), TRAIN[kept, :16].astype(np.float32))


def test_labels_out_of_range_are_refused_or_skipped() -> None:
    data = make()
    data.test_labels = np.array([0, 1, 2, 3, 0, 1, 2, -1, 0])
    with pytest.raises(UserError, match=r"2 test clouds of 9 .*test\[3\] has the label 3; allowed: 0 to 2, test\[7\]"):
        data.check()
    data = make(on_corrupt="skip")
    data.test_labels = np.array([0, 1, 2, 3, 0, 1, 2, -1, 0])
    with pytest.warns(UserWarning, match="2 test clouds of 9"):
        assert len(data.test_dataset()) == 7  # type: ignore[arg-type]


@pytest.mark.parametrize("on_corrupt", ["refuse", "skip"])
def test_sources_without_a_cloud_are_refused(on_corrupt: str) -> None:
    data = make(on_corrupt=on_corrupt)
    data.test, data.test_labels = TEST[:0], LABELS[:0]
    with pytest.raises(UserError, match="data has 0 test clouds; allowed: 1 or more"):
        data.check()
    data = make(on_corrupt=on_corrupt, num_calibration=None)
    data.train = broken(*range(30))
    with pytest.raises(UserError, match=r"train\[\d+\] has 20 points, none finite"):
        data.check()


def test_fewer_clouds_than_asked_are_all_used_with_a_word() -> None:
    with pytest.warns(UserWarning, match=r"num_calibration is 99, but there are 30 clouds: all 30 are used"):
        assert len(inputs(make(num_calibration=99))) == 30
    with pytest.raises(UserError, match=r"batch_size is 13; allowed: 1 to 12, .*data\.init_args\.num_calibration"):
        make(batch_size=13).check()


def test_extents_that_no_range_can_hold_are_warned_of() -> None:
    scaled = TRAIN * np.where(np.arange(30) == 4, 1e6, 1.0)[:, None, None]
    data = make(num_calibration=None)
    data.train = scaled
    with pytest.warns(UserWarning, match="normalize is 'none', and the clouds' extents go from"):
        data.check()
    data = make(num_calibration=None, normalize="unit_sphere")
    data.train = scaled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.check()


def test_views() -> None:
    data = make(augment_rotation=0, augment_scale=0, augment_jitter=0)
    assert not data.augments
    assert make().augments
    assert torch.equal(data.augment(inputs(data), torch.Generator()), inputs(data))


def test_fingerprint_sees_points_labels_and_settings() -> None:
    changed, labelled = make(), make()
    changed.test = TEST + 1e-3
    labelled.train_labels = (LABELS + 1) % 3
    variants = [make(), changed, labelled, make(num_points=8), make(up="z"), make(calibration_seed=1)]
    assert len({data.fingerprint() for data in variants}) == len(variants)
    assert make(batch_size=2).fingerprint() == variants[0].fingerprint()


@dataclass(eq=False)
class Scaled(Bolts):
    """A setting of its own beside those of the base."""

    factor: float
    num_points: int = field(default=8, kw_only=True)


def test_a_subclass_adds_settings_without_repeating_any() -> None:
    data = Scaled(2.0, num_calibration=12, batch_size=4)
    data.check()
    assert inputs(data).shape == (12, 8, 3)
    described = describe(data)["init_args"]
    assert (described["factor"], described["num_points"], described["sampling"]) == (2.0, 8, "first")
    assert Scaled(**described).fingerprint() == data.fingerprint()


def test_all_settings_are_written_into_the_configuration() -> None:
    described = describe(make(augment_rotation=5.0))
    assert described["class_path"].endswith(".Bolts")
    assert described["init_args"]["augment_rotation"] == 5.0
    assert Bolts(**described["init_args"]).fingerprint() == make().fingerprint()


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("num_calibration", 0, "1 or more, or null for all clouds"),
        ("on_corrupt", "delete", "refuse or skip"),
        ("num_points", 0, "1 or more"),
        ("augment_scale", 1.5, "0 or more and below 1"),
        ("batch_size", 0, "1 or more"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"data\.init_args\.{key} is {value!r}; allowed: {allowed}"):
        make(**{key: value})
