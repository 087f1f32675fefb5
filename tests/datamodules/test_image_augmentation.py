"""Further views of images: every one is a mirrored or moved copy, found again by exhaustive search."""

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pack_ptq.datamodules import DigitsData, ImageFolderData, TensorData
from pack_ptq.datamodules.image_augmentation import Augmentation, change_images
from pack_ptq.errors import UserError

IMAGES = torch.randn(64, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def changed(augmentation: Any, images: Tensor = IMAGES, seed: int = 1) -> Tensor:
    return change_images(images, augmentation, torch.Generator().manual_seed(seed))


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """Look up every pixel by hand, with the border reflected."""

    def source(index: int, size: int) -> int:
        index = abs(index)
        return index if index < size else 2 * (size - 1) - index

    rows = [source(i + down, image.shape[1]) for i in range(image.shape[1])]
    columns = [source(i + right, image.shape[2]) for i in range(image.shape[2])]
    return image[:, rows][:, :, columns]


def explanations(image: Tensor, view: Tensor) -> list[tuple[bool, int, int]]:
    """Give all (mirrored, down, right) that lead from an image to its view."""
    ways = itertools.product((False, True), range(-2, 3), range(-3, 4))
    return [way for way in ways if torch.equal(moved(image.flip(2) if way[0] else image, *way[1:]), view)]


@pytest.mark.parametrize("augmentation", get_args(Augmentation))
def test_every_view_is_one_mirrored_or_moved_image(augmentation: str) -> None:
    before = IMAGES.clone()
    views = changed(augmentation)
    assert views.shape == IMAGES.shape
    assert torch.equal(before, IMAGES), "the samples stay as they are"
    found = [explanations(image, view) for image, view in zip(IMAGES, views, strict=True)]
    assert all(len(ways) == 1 for ways in found)
    mirrored, down, right = zip(*[ways[0] for ways in found], strict=True)
    assert (set(mirrored) == {False, True}) == ("flip" in augmentation)
    assert any(mirrored) == ("flip" in augmentation)
    reached = (set(range(-2, 3)), set(range(-3, 4))) if "shift" in augmentation else ({0}, {0})
    assert (set(down), set(right)) == reached
    if "flip" in augmentation:
        assert 20 < sum(mirrored) < 44


def test_the_generator_decides() -> None:
    assert torch.equal(changed("flip_shift"), changed("flip_shift"))
    assert not torch.equal(changed("flip_shift"), changed("flip_shift", seed=2))
    assert torch.equal(changed("none"), IMAGES)


def test_images_too_small_to_move_are_only_mirrored() -> None:
    small = IMAGES[:, :, :7, :7]
    assert torch.equal(changed("shift", small), small)
    assert torch.equal(changed("flip_shift", small), changed("flip", small))


def test_which_data_augments(tmp_path: Any) -> None:
    folder = ImageFolderData(tmp_path, tmp_path)
    assert folder.augments
    assert not torch.equal(folder.augment(IMAGES, torch.Generator().manual_seed(0)), IMAGES)
    still = ImageFolderData(tmp_path, tmp_path, augmentation="none")
    for data in (still, DigitsData(), TensorData(IMAGES, (IMAGES, torch.zeros(64).long()))):
        assert not data.augments
        assert torch.equal(data.augment(IMAGES, torch.Generator().manual_seed(0)), IMAGES)
    with pytest.raises(
        UserError, match=r"data\.init_args\.augmentation is 'twist'; allowed: none, flip, shift, flip_shift"
    ):
        ImageFolderData(tmp_path, tmp_path, augmentation="twist")  # type: ignore[arg-type]
