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


def kl_from_full_precision(logits: Tensor, reference: Tensor) -> Tensor:
    """Give `KL(p_fp || p_q)` per sample, in nats (METHOD P1).

    With three axes the scores are those of points, as point networks and sequences have them: softmax over the last
    axis, averaged over points, so that the size does not depend on how many were drawn. With any other number the
    softmax is over axis 1, and further axes are summed.

    Args:
        logits: Of the quantized network, shape (batch, classes), (batch, points, classes) or (batch, classes, height,
            width).
        reference: Of the full-precision network, the same shape.
    """
    axis = 2 if logits.ndim == 3 else 1
    divergence = F.kl_div(logits.log_softmax(axis), reference.log_softmax(axis), reduction="none", log_target=True)
    return divergence.sum(2).mean(1) if logits.ndim == 3 else divergence.flatten(1).sum(1)
