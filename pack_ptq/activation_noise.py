"""Fixed noise that linear layers add to their inputs before they quantize them (NoisyQuant, arXiv 2211.16056).

With noise `n`, a layer's `W Q(x) + b` becomes `W Q(x + n) + (b - W n)`: values that crowd just beside a code are spread
over two, and what the noise itself adds to the output is taken out again by the bias, exactly. An integer runtime adds
one vector to the layer's input before it quantizes it; the bias costs nothing.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pack_ptq.distributed import all_reduce, world
from pack_ptq.graph.part import Part, layer_inputs
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.layers import QuantizedLayer

AMPLITUDES = tuple(step / 10 for step in range(21))  # of the noise, over the input's scale
SAMPLES = 32


@torch.no_grad()
def add_noise(part: Part, data: PackData, seed: int) -> None:
    """Give the linear layers of a part noise of the amplitude with the smallest output error, or none if 0 has it.

    A layer's noise is drawn once, uniformly for every input channel; the search only stretches it. The error is that of
    the layer alone, `W x - Q(W) Q(x)` squared, on the input that it reads in the quantized part, with weights rounded
    to nearest; layers come in execution order, each behind the noise of those before it. Inputs without codes, or with
    other ones than uniform, get none.

    Args:
        part: Its ranges must be set; all its quantizers are off before and after.
        data: Cached activations; the first samples are taken.
        seed: Of the draws; over several processes those of the first one count.
    """
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(part.layers.values()):
        layer.noise = None
        codes = layer.input_quantizer
        if not isinstance(layer.layer, nn.Linear) or codes.bits is None or codes.kind != "uniform":
            continue
        drawn = 2 * torch.rand(layer.layer.in_features, generator=generator) - 1
        drawn = all_reduce(drawn if world()[0] == 0 else torch.zeros_like(drawn)).to(codes.scale)
        candidates = [amplitude * codes.scale * drawn for amplitude in AMPLITUDES]
        errors = torch.zeros(len(candidates), dtype=torch.float64)
        for x in data.first_inputs(SAMPLES):
            with quantized(part.operations, "nearest"):
                for read in layer_inputs(part, x)[index]:
                    errors += _errors(layer, read, candidates)
        best = int(all_reduce(errors).argmin())
        layer.noise = candidates[best] if best else None


def _errors(layer: QuantizedLayer, x: Tensor, candidates: list[Tensor]) -> Tensor:
    """Give the sum of the squared errors of a layer's output with each noise, shape (candidates,); all leave none."""
    wanted = functional_call(layer.layer, {"weight": layer.compensated_weight}, (x,))
    errors = []
    for noise in candidates:
        layer.noise = noise
        errors.append((layer.compute(x) - wanted).square().sum(dtype=torch.float64).item())
    layer.noise = None
    return torch.tensor(errors, dtype=torch.float64)
