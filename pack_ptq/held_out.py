"""The calibration samples that nothing is fitted to, since they judge the last pass over the network."""

import torch
from torch import Tensor

from pack_ptq.distributed import world
from pack_ptq.types import Recipe
from pack_ptq.views import derived_seed


def held_out_rows(recipe: Recipe, samples: int, seed: int) -> Tensor:
    """Draw samples of this process; they may come in the order of their classes, so it is not the first ones.

    Args:
        recipe: Says what share is held out; none is if it has no last pass.
        samples: Of this process; one at least is left.
        seed: Of the run.

    Returns:
        Their places in rising order.
    """
    if not recipe.tuning_steps:
        return torch.empty(0, dtype=torch.long)
    count = min(max(1, int(samples * recipe.tuning.held_out)), samples - 1)
    generator = torch.Generator().manual_seed(derived_seed(seed, "held out", world()[0]))
    return torch.randperm(samples, generator=generator)[:count].sort().values
