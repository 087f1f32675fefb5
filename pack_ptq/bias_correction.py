"""Correct biases for what quantization adds on average to a layer's output (arXiv 1906.04721, section 4.2)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pack_ptq.distributed import all_reduce
from pack_ptq.graph.part import Part, layer_inputs
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.input_mean import by_channel
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.types import ReconstructionSpec

BIAS_LR = 0.01
SAMPLES = 64


class _Errors:
    """Sums of a layer's output error, by output channel."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer
        inner: Any = layer.layer
        channels = inner.out_features if isinstance(inner, nn.Linear) else inner.out_channels
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(2, dtype=torch.float64)  # and their number

    def see(self, x: Tensor) -> None:
        wanted = functional_call(self.layer.layer, {"weight": self.layer.compensated_weight}, (x,))
        rows = by_channel(self.layer.layer, wanted - self.layer.compute(x))
        self.total = self.total.to(rows.device) + rows.sum(0, dtype=torch.float64)
        self.squares += torch.tensor([rows.square().sum().item(), rows.numel()], dtype=torch.float64)

    def merge(self) -> float:
        """Merge over processes, correct the bias, and give the root mean square."""
        (squares, count), total = all_reduce(self.squares).tolist(), all_reduce(self.total)
        if self.layer.bias is not None and count:
            mean = (total * total.numel() / count).to(self.layer.bias)
            self.layer.correction = nn.Parameter(mean, requires_grad=False)
        return (squares / max(1, count)) ** 0.5


def bias_rate(part: Part, spec: ReconstructionSpec) -> float:
    """Give the rate of the spec, or the one for parts of this kind if it names none.

    What follows softmax or GELU crowds just beside a code, so rounding moves all of it to one side; what ReLU has cut
    does not, and there corrections were no gain (docs/experiments.md).
    """
    if spec.bias_lr is not None:
        return spec.bias_lr
    return BIAS_LR if part.products or any(quantizer.role != "any" for quantizer in part.quantizers) else 0.0


@torch.no_grad()
def correct_biases(part: Part, data: PackData) -> list[float]:
    """Give every layer of a part that has a bias the mean of its output error as a correction.

    The error is that of the layer alone, `W x - Q(W) Q(x)` on the input that it reads in the quantized part, with
    weights rounded to nearest.

    Args:
        part: Its ranges must be set; all its quantizers are off before and after.
        data: Cached activations; the first samples are taken.

    Returns:
        The root mean square of every layer's output error.
    """
    layers = list(part.layers.values())
    for layer in layers:
        layer.correction = None
    errors = [_Errors(layer) for layer in layers]
    for x in data.first_inputs(SAMPLES):
        with quantized(part.operations, "nearest"):
            for error, inputs in zip(errors, layer_inputs(part, x), strict=True):
                for read in inputs:
                    error.see(read)
    return [error.merge() for error in errors]
