"""Losses at a block's output and at the network's output."""

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Give the squared error summed over channels (axis 1), averaged over samples and positions (BRECQ, METHOD P3).

    Args:
        output: Of the quantized part, shape (batch, channels, ...).
        target: Of the full-precision part, the same shape.
        weight: Of every element's squared error, the same shape; 1 if not given.
    """
    if weight is None:
        return F.mse_loss(output, target) * output.shape[1]
    return (weight * (output - target).square()).mean() * output.shape[1]


def class_axis(logits: Tensor) -> int:
    """Give the axis of the classes: the last of three, as point networks and sequences have them, else axis 1."""
    return 2 if logits.ndim == 3 else 1


def kl_from_full_precision(logits: Tensor, reference: Tensor) -> Tensor:
    """Give `KL(p_fp || p_q)` per sample, in nats (METHOD P1).

    With three axes (see `class_axis`) it is averaged over points, so that the size does not depend on how many were
    drawn; with more the further axes are summed.

    Args:
        logits: Of the quantized network, shape (batch, classes), (batch, points, classes) or (batch, classes, height,
            width).
        reference: Of the full-precision network, the same shape.
    """
    axis = class_axis(logits)
    divergence = F.kl_div(logits.log_softmax(axis), reference.log_softmax(axis), reduction="none", log_target=True)
    return divergence.sum(2).mean(1) if logits.ndim == 3 else divergence.flatten(1).sum(1)


def same_class(logits: Tensor, reference: Tensor) -> Tensor:
    """Give the share of each sample's points or positions that get the class of the full-precision network.

    Args:
        logits: Of the quantized network, shaped as for `kl_from_full_precision`.
        reference: Of the full-precision network, the same shape.

    Returns:
        Shape (batch,), 0 to 1.
    """
    axis = class_axis(logits)
    same = logits.argmax(axis) == reference.argmax(axis)
    return same.double().reshape(len(logits), -1).mean(1)
