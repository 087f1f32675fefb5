"""The perceptron that point networks share over all points."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

NORMS = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}


def shared_mlp(
    layer: type[nn.Linear | nn.Conv1d | nn.Conv2d],
    channels: Sequence[int],
    activation: Callable[[], nn.Module] = nn.ReLU,
    bias: bool = True,
) -> nn.Sequential:
    """Stack layers that see one point at a time, each followed by BatchNorm and an activation.

    Args:
        layer: `nn.Conv1d` over points (batch, channels, points), `nn.Conv2d` over neighbours of points
            (batch, channels, points, neighbours), both with kernel 1, or `nn.Linear` over objects (batch, channels).
        channels: Of the input and of each layer's output.
        activation: Made once per layer.
        bias: Whether the layers have one beside that of BatchNorm.

    Returns:
        Modules `conv1`, `bn1`, `act1`, `conv2`, ... (`linear1`, ... for `nn.Linear`).
    """
    name = "linear" if layer is nn.Linear else "conv"
    options: dict[str, Any] = {"bias": bias} if layer is nn.Linear else {"bias": bias, "kernel_size": 1}
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(pairwise(channels), start=1):
        modules[f"{name}{number}"] = layer(before, after, **options)
        modules[f"bn{number}"] = NORMS[layer](after)
        modules[f"act{number}"] = activation()
    return nn.Sequential(modules)
