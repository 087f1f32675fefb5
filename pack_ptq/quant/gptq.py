"""Roundings that make up for each other, one input column after the other (GPTQ, arXiv 2210.17323)."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pack_ptq.quant.affine import Limits
from pack_ptq.quant.input_mean import by_channel

DAMPING = 0.01  # of the mean square of the inputs, added to the square of each, as published
COLUMNS = 128  # whose errors are carried on to the rest at once


def multiplied(layer: nn.Module, x: Tensor) -> Tensor:
    """Give what each weight of a layer multiplies.

    Args:
        layer: A convolution, not a transposed one, or a linear layer.
        x: What it reads.

    Returns:
        Shape (groups, rows, columns): a row for every sample and place of the output, a column for each of the weights
        that one output channel has.
    """
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    assert isinstance(weight, Tensor)
    columns = weight[0].numel()
    # As its weight, an identity makes the layer give what it multiplies, however it pads, strides and dilates.
    identity = torch.eye(columns, device=x.device, dtype=x.dtype).reshape(columns, *weight.shape[1:])
    parameters = {"weight": identity.repeat(groups, *[1] * (weight.ndim - 1))}
    if layer.bias is not None:
        parameters["bias"] = x.new_zeros(groups * columns)
    rows = by_channel(layer, functional_call(layer, parameters, (x,)))
    return rows.unflatten(1, (groups, columns)).transpose(0, 1)


def gptq_start(weight: Tensor, gram: Tensor, limits: Limits) -> Tensor | None:
    """Give values whose nearest codes are those of GPTQ, within half a code of them.

    Columns are rounded one after the other, those of the largest inputs first, and what a column's rounding adds to the
    output `W x` is taken off it again, as far as inputs are alike, by the columns that are still to come. What a column
    had then become says how near its rounding was to the other side.

    Args:
        weight: Over scales and with the zero point, so that codes are integers, shape (groups, channels, columns).
        gram: Mean product of two inputs, shape (groups, columns, columns), float64.
        limits: Smallest and largest code.

    Returns:
        Shape and type as `weight`; nothing if the products are too ill-conditioned, or not finite.
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    order = squares.argsort(1, descending=True)
    size = squares.mean(1, keepdim=True)
    gram = gram + torch.diag_embed((DAMPING * size + (size == 0)).expand_as(squares))
    gram = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None, :].expand_as(gram))
    # The upper factor `U` of the inverse, `U^T U`, is the inverse of that of the matrix itself, `R R^T`.
    factor, failed = torch.linalg.cholesky_ex(gram.flip(1, 2))
    if failed.any():
        return None
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    carry = torch.linalg.solve_triangular(factor, identity, upper=False).flip(1, 2).to(weight)
    order = order[:, None, :].expand_as(weight)
    left = weight.gather(2, order)
    start = torch.empty_like(left)
    columns = weight.shape[2]
    for first in range(0, columns, COLUMNS):
        stop = min(first + COLUMNS, columns)
        errors = torch.empty_like(left[:, :, first:stop])
        for column in range(first, stop):
            value = left[:, :, column]
            code = value.round().clamp(*limits)
            start[:, :, column] = code + (value - code).clamp(-0.499, 0.499)
            error = (value - code) / carry[:, column, column, None]
            errors[:, :, column - first] = error
            left[:, :, column + 1 : stop] -= error[:, :, None] * carry[:, None, column, column + 1 : stop]
        left[:, :, stop:] -= errors @ carry[:, first:stop, stop:]
    return torch.empty_like(start).scatter_(2, order, start)
