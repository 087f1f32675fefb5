"""Further views of calibration clouds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.cloud import Up
from pack_ptq.errors import refuse

CLIP = 3.0  # standard deviations


@dataclass(frozen=True)
class PointAugmentation:
    """How a further view of a cloud may differ from it; with three zeros there is none.

    Attributes:
        rotation: Largest turn about the upward axis to either side, in degrees, 0 to 180.
        scale: Largest change of the size, as a share of it, 0 up to but not including 1.
        jitter: Standard deviation of what is added to every coordinate, in its units, 0 or more; cut off at three.

    Raises:
        UserError: A value is out of range.
    """

    rotation: float = 0.0
    scale: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise refuse(f"{KEY}.augment_rotation", self.rotation, "0 to 180 degrees")
        if not 0 <= self.scale < 1:
            raise refuse(f"{KEY}.augment_scale", self.scale, "0 or more and below 1")
        if not 0 <= self.jitter < math.inf:
            raise refuse(f"{KEY}.augment_jitter", self.jitter, "0 or more")

    @property
    def changes(self) -> bool:
        """Whether views differ at all."""
        return bool(self.rotation or self.scale or self.jitter)

    def change(self, clouds: Tensor, up: Up, generator: torch.Generator) -> Tensor:
        """Turn, scale and jitter clouds, each by choices of its own.

        Args:
            clouds: `(batch, n, 3 or more)`; columns after x, y, z stay as they are.
            up: Axis that points upward.
            generator: Source of every choice.
        """
        angles, scales = torch.rand(2, len(clouds), generator=generator) * 2 - 1
        turned = clouds[..., :3] @ _turns(angles * math.radians(self.rotation), up).to(clouds.dtype)
        turned = turned * (1 + self.scale * scales[:, None, None])
        if self.jitter:
            noise = torch.randn(turned.shape, generator=generator).clamp(-CLIP, CLIP)
            turned = turned + self.jitter * noise
        return torch.cat([turned, clouds[..., 3:]], -1)


def _turns(angles: Tensor, up: Up) -> Tensor:
    """Give rotations `(batch, 3, 3)` about the upward axis, for points as rows."""
    first, second, axis = (2, 0, 1) if up == "y" else (0, 1, 2)
    turns = torch.zeros(len(angles), 3, 3)
    turns[:, first, first] = turns[:, second, second] = angles.cos()
    turns[:, first, second], turns[:, second, first] = angles.sin(), -angles.sin()
    turns[:, axis, axis] = 1
    return turns
