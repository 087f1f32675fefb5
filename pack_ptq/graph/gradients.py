"""Whether gradients pass through a network, without which nothing can be fitted behind or before the place."""

import torch
from torch import Tensor

from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain


def check_gradients(chain: Chain, x: Tensor) -> None:
    """Refuse a network that cuts gradients on the way of its data, as `torch.no_grad` around a backbone does.

    Args:
        chain: The prepared network; all quantizers off.
        x: A few inputs, shape (batch, ...).

    Raises:
        UserError: What a link gives does not depend on what it reads, for autograd.
    """
    for link, name in enumerate(chain.names):
        read = x.detach().requires_grad_()
        with torch.enable_grad():
            value = chain.run(read.clone(), link, link + 1)  # networks may write into what they read, not into a leaf
        if (cause := _cause(value, read)) is not None:
            raise UserError(
                f"the network's forward pass lets no gradients through {name} ({cause}); allowed: a forward pass "
                "through which they reach every block, or recipe.reconstruction.steps 0 and recipe.tuning.steps 0"
            )
        x = value


def _cause(value: Tensor, read: Tensor) -> str | None:
    """Tell why the gradient of a value cannot be had by what it was computed from, if so."""
    cut = "cut by torch.no_grad, torch.inference_mode, .detach() or .data"
    if not value.requires_grad:
        return cut
    try:
        return cut if torch.autograd.grad(value.sum(), read, allow_unused=True)[0] is None else None
    except RuntimeError as error:  # as of checkpointing, which computes parts of the network again
        return str(error).partition("\n")[0]
