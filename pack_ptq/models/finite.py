"""Refusing networks with NaN or infinite weights or activations."""

from typing import Any

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def check_activations(network: nn.Module, example: Tensor) -> None:
    """Run the network once and look at what enters and leaves its layers with weights.

    Failures of the forward pass are left to whoever runs the network next.

    Args:
        network: In any mode; it is run in evaluation mode and left as it was.
        example: A few input samples, shape (batch, ...).

    Raises:
        UserError: A value is NaN or infinite; the message names the first such layer.
    """

    def watch(path: str, what: str, values: Any) -> None:
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                raise UserError(f"the {what} of layer {path} holds NaN or infinity; allowed: finite activations")

    layers = {path: module for path, module in network.named_modules() if path and module._parameters}
    modes = {module: module.training for module in network.modules()}
    handles = []
    for path, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda _, x, path=path: watch(path, "input", x)))
        handles.append(layer.register_forward_hook(lambda _m, _x, y, path=path: watch(path, "output", y)))
    try:
        network.eval()
        network(example)
    except UserError:
        raise
    except Exception:  # the network's own code may raise anything
        return
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
