"""The preprocessing against timm's own, and whose wishes count."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from pack_ptq.datamodules.image_transform import UserPreprocessing, image_transform
from pack_ptq.errors import UserError
from pack_ptq.types import Preprocessing

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / os.environ.get("PACK_PTQ_ASSETS", "../shared/assets")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK = Preprocessing((224, 224), MEAN, STD, 0.875, "bicubic")


def photo() -> Image.Image:
    folder = ASSETS / "imagenet" / "val"
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}")
    return Image.open(min(folder.rglob("*.JPEG"))).convert("RGB")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "crop_ratio"), [(224, 0.875), (224, 1.0), (96, 0.75), (320, 1.0)])
@pytest.mark.parametrize("box", [(0, 0, 227, 227), (0, 0, 227, 150), (20, 0, 140, 227)])
def test_equals_timm_on_a_real_image(
    interpolation: str, size: int, crop_ratio: float, box: tuple[int, int, int, int]
) -> None:
    image = photo().crop(box)
    ours = image_transform(Preprocessing((size, size), MEAN, STD, crop_ratio, interpolation))(image)
    timms = create_transform(
        (3, size, size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_ratio, is_training=False
    )(image)
    assert type(ours) is torch.Tensor
    assert ours.shape == (3, size, size)
    torch.testing.assert_close(ours, timms, atol=1e-5, rtol=1e-5)


def test_values_by_hand() -> None:
    image = Image.new("RGB", (40, 30), (255, 51, 0))
    preprocessing = Preprocessing((8, 8), (0.5, 0.25, 0.0), (0.5, 0.5, 2.0), 0.8, "bilinear")
    channels = image_transform(preprocessing)(image).flatten(1)
    torch.testing.assert_close(channels, torch.tensor([[1.0], [-0.1], [0.0]]).expand(3, 64), atol=1e-6, rtol=0)


def test_resized_side_is_rounded_and_centred() -> None:
    # Columns 0..99 hold their own number: nearest at ratio 0.5 keeps the middle 50 as they are.
    image = Image.new("L", (100, 100))
    image.putdata([column for _ in range(100) for column in range(100)])
    preprocessing = Preprocessing((50, 50), (0.0,) * 3, (1.0,) * 3, 0.5, "nearest")
    row = image_transform(preprocessing)(image.convert("RGB"))[0, 0] * 255
    assert row.round().int().tolist() == list(range(25, 75))


def test_torchvisions_232_survives_the_ratio() -> None:
    # 224 / (224 / 232) is a hair off 232 in floating point; rounding down would lose a pixel.
    steps = image_transform(Preprocessing((224, 224), MEAN, STD, 224 / 232)).transforms  # type: ignore[attr-defined]
    assert steps[0].size == [232]


def test_crop_of_another_height_than_width() -> None:
    image = Image.new("RGB", (300, 200))
    assert image_transform(Preprocessing((64, 96), MEAN, STD, 0.9))(image).shape == (3, 64, 96)


def test_network_fills_what_the_user_left_open() -> None:
    assert UserPreprocessing().over(NETWORK) == NETWORK
    mixed = UserPreprocessing(image_size=160, mean=[0.5, 0.5, 0.5]).over(NETWORK)
    assert mixed == Preprocessing((160, 160), (0.5, 0.5, 0.5), STD, 0.875, "bicubic")
    everything = UserPreprocessing(32, [0.0] * 3, [1.0] * 3, 0.5, "nearest").over(NETWORK)
    assert everything == Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, 0.5, "nearest")


def test_only_ratio_and_interpolation_have_a_fallback() -> None:
    alone = UserPreprocessing(32, [0.0] * 3, [1.0] * 3).over(None)
    assert (alone.crop_ratio, alone.interpolation) == (1.0, "bilinear")
    with pytest.raises(UserError, match=r"data\.init_args\.mean is None; allowed: a value of your own"):
        UserPreprocessing(image_size=32, std=[1.0] * 3).over(None)


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(UserError) as refusal:
        UserPreprocessing().over(None)
    for key in ("image_size", "mean", "std"):
        assert f"data.init_args.{key}" in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("image_size", 0, "1 or more"),
        ("mean", [0.5], "three numbers"),
        ("std", [0.5, 0.5], "three numbers above 0"),
        ("std", [0.5, 0.0, 0.5], "three numbers above 0"),
        ("crop_ratio", 0.0, "above 0 and at most 1"),
        ("crop_ratio", 1.1, "above 0 and at most 1"),
        ("interpolation", "cubic", "nearest, bilinear, bicubic, lanczos"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: object, allowed: str) -> None:
    with pytest.raises(UserError) as refusal:
        UserPreprocessing(**{key: value})
    assert str(refusal.value).startswith(f"data.init_args.{key} is {value!r}; allowed: {allowed}")


def test_network_for_grey_images_is_refused() -> None:
    grey = Preprocessing(**{**asdict(NETWORK), "mean": (0.5,), "std": (0.5,)})
    with pytest.raises(UserError, match=r"data\.init_args\.mean is \(0\.5,\); allowed: three numbers"):
        UserPreprocessing().over(grey)
