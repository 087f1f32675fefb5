"""Let the roundings of a part begin where GPTQ puts them (arXiv 2210.17323), before they are fitted."""

import torch
from torch import Tensor

from pack_ptq.distributed import all_reduce
from pack_ptq.graph.part import Part, layer_inputs
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.gptq import gptq_start, multiplied
from pack_ptq.quant.layers import TRANSPOSED, QuantizedLayer

SAMPLES = 256
ELEMENTS = 2**24  # of what weights multiply, at once
MOST_COLUMNS = 8192  # whose products take half a gigabyte, and their factor a minute of one core


@torch.no_grad()
def start_by_columns(part: Part, data: PackData) -> None:
    """Give the layers of a part a `start` for their roundings, but for transposed convolutions and very wide layers.

    The inputs are those that the layer reads in the quantized part, behind the starts of the layers before it. Where
    its bias takes up what rounded weights add on average, only what inputs are beside their mean has to be made up for.

    Args:
        part: Its ranges must be set; all its quantizers are off before and after.
        data: Cached activations; the first samples are taken.
    """
    layers = list(part.layers.values())
    for layer in layers:
        layer.start = None
    for index, layer in enumerate(layers):
        if isinstance(layer.layer, TRANSPOSED) or layer.weight[0].numel() > MOST_COLUMNS:
            continue
        gram = _gram(part, index, data)
        if gram is None:
            continue
        quantizer, weight = layer.weight_quantizer, layer.compensated_weight
        codes = (weight / quantizer.scale + quantizer.zero_point).reshape(len(gram), -1, gram.shape[-1])
        start = gptq_start(codes, gram, quantizer.limits)
        if start is not None:
            layer.start = (start.reshape(weight.shape) - quantizer.zero_point) * quantizer.scale


def _gram(part: Part, index: int, data: PackData) -> Tensor | None:
    """Give the mean product of each two inputs of a layer over samples and places, or nothing if it reads none."""
    layer = list(part.layers.values())[index]
    groups, columns = getattr(layer.layer, "groups", 1), layer.weight[0].numel()
    # What inputs are beside 1, the last, is their sum.
    total = torch.zeros(groups, columns + 1, columns + 1, dtype=torch.float64, device=layer.weight.device)
    with quantized(part.operations, "nearest"):
        for x in data.first_inputs(SAMPLES):
            for read in layer_inputs(part, x)[index]:
                total += _products(layer, read)
    total = all_reduce(total)
    count = total[0, -1, -1]
    if not count:
        return None
    mean, gram = total[:, :-1, -1:] / count, total[:, :-1, :-1] / count
    return gram - mean @ mean.mT if layer.corrects_mean and layer.bias is not None else gram


def _products(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Give the sums of the products of each two inputs, of which the last is 1."""
    inner = layer.layer
    x = layer.input_quantizer(x) if layer.noise is None else layer.input_quantizer(x + layer.noise) - layer.noise
    x = x.reshape(-1, *x.shape[x.ndim - 1 - len(getattr(inner, "kernel_size", ())) :])
    size = getattr(inner, "groups", 1) * layer.weight[0].numel() * x[0, 0].numel()
    total: Tensor = torch.zeros(())
    for some in x.split(max(1, ELEMENTS // size)):
        rows = multiplied(inner, some)
        rows = torch.cat((rows, torch.ones_like(rows[:, :, :1])), 2)
        total = total + (rows.mT @ rows).double()
    return total
