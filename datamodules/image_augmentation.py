"""Further views of calibration images."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["none", "flip", "shift", "flip_shift"]
SHIFT = 8  # an image moves by at most its size over this


def change_images(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and move each by up to an eighth of its size; what comes in is the reflected border.

    Args:
        images: Shape (batch, channels, height, width).
        augmentation: Which of the two.
        generator: Source of every choice.

    Returns:
        The same shape.
    """
    if "flip" in augmentation:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    if "shift" in augmentation:
        height, width = images.shape[2:]
        down, right = height // SHIFT, width // SHIFT
        padded = F.pad(images, (right, right, down, down), mode="reflect")
        tops = torch.randint(2 * down + 1, (len(images),), generator=generator).tolist()
        lefts = torch.randint(2 * right + 1, (len(images),), generator=generator).tolist()
        cuts = zip(padded, tops, lefts, strict=True)
        images = torch.stack([image[:, top : top + height, left : left + width] for image, top, left in cuts])
    return images
