"""From an RGB image to the network's input: whose wishes count, and the steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pack_ptq.datamodules.base import KEY
from pack_ptq.errors import refuse
from pack_ptq.types import Preprocessing

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class UserPreprocessing:
    """What the user set of the preprocessing; None leaves it to the network.

    Attributes:
        image_size: Height and width in pixels after the crop, 1 or more.
        mean: Per channel (red, green, blue), for pixel values in [0, 1].
        std: Per channel, above 0, for pixel values in [0, 1].
        crop_ratio: Side of the crop over the shorter side of the resized image, in (0, 1].
        interpolation: One of nearest, bilinear, bicubic, lanczos.

    Raises:
        UserError: A value is out of range.
    """

    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_ratio: float | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise refuse(f"{KEY}.image_size", self.image_size, "1 or more")
        if self.mean is not None and len(self.mean) != 3:
            raise refuse(f"{KEY}.mean", self.mean, "three numbers (red, green, blue)")
        if self.std is not None and (len(self.std) != 3 or min(self.std) <= 0):
            raise refuse(f"{KEY}.std", self.std, "three numbers above 0 (red, green, blue)")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise refuse(f"{KEY}.crop_ratio", self.crop_ratio, "above 0 and at most 1")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise refuse(f"{KEY}.interpolation", self.interpolation, ", ".join(INTERPOLATIONS))

    def over(self, network: Preprocessing | None) -> Preprocessing:
        """Fill what is not set with the network's own wishes.

        Without a network's wishes the crop ratio falls back to 1.0 and the interpolation to bilinear; size, mean and
        standard deviation have no default, for a wrong guess costs accuracy silently.

        Raises:
            UserError: Neither side gives a size, mean or standard deviation, or the network's are not for RGB.
        """
        if network is None:
            self._refuse_gaps()
            network = Preprocessing(image_size=(0, 0), mean=(), std=())
        size = network.image_size if self.image_size is None else (self.image_size, self.image_size)
        # The network's values pass the same checks as the user's.
        whole = UserPreprocessing(
            min(size),
            tuple(self.mean or network.mean),
            tuple(self.std or network.std),
            network.crop_ratio if self.crop_ratio is None else self.crop_ratio,
            self.interpolation or network.interpolation,
        )
        return Preprocessing(size, whole.mean, whole.std, whole.crop_ratio, whole.interpolation)  # type: ignore[arg-type]

    def _refuse_gaps(self) -> None:
        gaps = [f"{KEY}.{name}" for name in ("image_size", "mean", "std") if getattr(self, name) is None]
        if gaps:
            raise refuse(
                " and ".join(gaps),
                None,
                "a value of your own, since the network does not say how it wants its images"
                " (image_size in pixels; mean and std as three numbers for pixel values in [0, 1])",
            )


def image_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Build the steps from an RGB image to a float tensor `(3, height, width)`.

    The shorter side is resized, up or down, to the longer side of the crop over the crop ratio, rounded to pixels;
    then come the centre crop, values in [0, 1] and the normalization.
    """
    # Rounded down as timm does it; the margin keeps 224 / (224 / 232) at 232.
    side = math.floor(max(preprocessing.image_size) / preprocessing.crop_ratio + 1e-6)
    return v2.Compose(
        [
            v2.Resize(side, interpolation=v2.InterpolationMode(preprocessing.interpolation), antialias=True),
            v2.CenterCrop(list(preprocessing.image_size)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(preprocessing.mean), list(preprocessing.std)),
            v2.ToPureTensor(),
        ]
    )
