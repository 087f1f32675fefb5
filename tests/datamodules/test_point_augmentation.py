"""Further views: a turn about the upward axis, a size and noise, each within its bounds."""

import math

import pytest
import torch
from torch import Tensor

from pack_ptq.datamodules.point_augmentation import PointAugmentation
from pack_ptq.errors import UserError

CLOUDS = torch.randn(64, 100, 3, generator=torch.Generator().manual_seed(0))


def changed(augmentation: PointAugmentation, clouds: Tensor = CLOUDS, up: str = "y", seed: int = 1) -> Tensor:
    return augmentation.change(clouds, up, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def linear(before: Tensor, after: Tensor) -> Tensor:
    """Find the matrix from rows to rows, which must explain them all."""
    matrix = torch.linalg.lstsq(before, after).solution
    torch.testing.assert_close(before @ matrix, after, atol=1e-4, rtol=1e-4)
    return matrix


@pytest.mark.parametrize(("up", "axis"), [("y", 1), ("z", 2)])
@pytest.mark.parametrize("degrees", [10.0, 180.0])
def test_turns_are_rotations_about_the_upward_axis(up: str, axis: int, degrees: float) -> None:
    before = CLOUDS.clone()
    matrices = linear(CLOUDS, changed(PointAugmentation(rotation=degrees), up=up))
    assert torch.equal(before, CLOUDS), "the samples stay as they are"
    identity = torch.eye(3).expand(64, 3, 3)
    torch.testing.assert_close(matrices @ matrices.mT, identity, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(matrices[:, axis], identity[:, axis], atol=1e-4, rtol=0)
    first, second = [i for i in range(3) if i != axis]
    angles = torch.atan2(matrices[:, first, second], matrices[:, first, first]).rad2deg()
    assert angles.abs().max() <= degrees + 0.1
    assert angles.max() > 0.8 * degrees
    assert angles.min() < -0.8 * degrees


def test_sizes() -> None:
    views = changed(PointAugmentation(scale=0.2))
    scales = (views / CLOUDS).flatten(1)
    torch.testing.assert_close(scales, scales[:, :1].expand_as(scales), atol=1e-4, rtol=1e-4)
    assert 0.8 <= scales.min() < 0.84
    assert 1.16 < scales.max() <= 1.2 + 1e-4


def test_noise() -> None:
    noise = changed(PointAugmentation(jitter=0.05)) - CLOUDS
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert noise.abs().max().item() == pytest.approx(0.15, rel=1e-3)


def test_further_columns_stay() -> None:
    categories = torch.rand(64, 100, 5)
    views = changed(PointAugmentation(180, 0.1, 0.01), torch.cat([CLOUDS, categories], 2))
    assert torch.equal(views[..., 3:], categories)
    assert torch.equal(views[..., :3], changed(PointAugmentation(180, 0.1, 0.01)))


def test_the_generator_decides() -> None:
    augmentation = PointAugmentation(10, 0.1, 0.01)
    assert torch.equal(changed(augmentation), changed(augmentation))
    assert not torch.equal(changed(augmentation), changed(augmentation, seed=2))


def test_three_zeros_change_nothing() -> None:
    assert not PointAugmentation().changes
    assert torch.equal(changed(PointAugmentation()), CLOUDS)
    assert all(PointAugmentation(**{name: 0.5}).changes for name in ("rotation", "scale", "jitter"))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rotation", -1.0, "0 to 180 degrees"),
        ("rotation", 181.0, "0 to 180 degrees"),
        ("rotation", math.nan, "0 to 180 degrees"),
        ("scale", 1.0, "0 or more and below 1"),
        ("scale", -0.1, "0 or more and below 1"),
        ("jitter", -0.1, "0 or more"),
        ("jitter", math.inf, "0 or more"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"data\.init_args\.augment_{name} is {value}; allowed: {allowed}"):
        PointAugmentation(**{name: value})
