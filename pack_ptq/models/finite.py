"""Refusing networks with NaN or infinite weights."""

import torch
from torch import nn

from pack_ptq.errors import UserError

SHOWN = 3


def check_finite(network: nn.Module) -> None:
    """Look through all parameters and saved buffers of floating point.

    Buffers that are not saved are left out: masks filled with minus infinity belong to the network's code.

    Raises:
        UserError: A value is NaN or infinite; the message names the tensors.
    """
    state = network.state_dict()
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        named = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        raise UserError(f"the model's weights have NaN or infinite values in {len(bad)} layer tensors: {named}")
