"""The levels of a U-shaped network, handed from stage to stage as one tensor.

The decoder reads every level of the encoder, so data flows past every single level and the block search
(`pack_ptq/graph/blocks.py`) would find no place to cut. Each stage here therefore ends by joining all levels that are
still needed in one tensor, which all data passes through: a stage is a block. The values do not change.
"""

import torch
from torch import Tensor, nn


def bundle(levels: list[Tensor]) -> list[Tensor]:
    """Join tensors of shape (batch, ...) in one of shape (batch, values), and part it again."""
    joined = torch.cat([level.flatten(1) for level in levels], 1)
    parts = joined.split([level.shape[1:].numel() for level in levels], 1)
    return [part.unflatten(1, level.shape[1:]) for part, level in zip(parts, levels, strict=True)]


class Descend(nn.Module):
    """A stage of the encoder.

    Args:
        stage: Maps one level `(batch, points, channels)` to the next coarser one.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Append a coarser level to the given ones, which go from fine to coarse."""
        return bundle([*levels, self.stage(levels[-1])])


class Ascend(nn.Module):
    """A stage of the decoder.

    Args:
        stage: Maps two levels, the finer and the coarser one, to the finer one with both their features.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Merge the two last levels, 2 or more of which are given from fine to coarse."""
        *finer, fine, coarse = levels
        return bundle([*finer, self.stage(fine, coarse)])
