"""Put quantized layers in the place of the convolutions and linear layers that a forward pass calls."""

from torch import nn

from pack_ptq.errors import UserError
from pack_ptq.graph.trace import Trace
from pack_ptq.quant.layers import QUANTIZABLE, QuantizedLayer
from pack_ptq.quant.quantizers import ActivationQuantizer


def insert_quantized_layers(network: nn.Module, trace: Trace) -> tuple[dict[str, QuantizedLayer], list[str]]:
    """Wrap every quantizable layer that is called; layers that read the same tensor share its quantizer. In place.

    Args:
        network: In evaluation mode, BatchNorm folded.
        trace: A recording of this network.

    Returns:
        The quantized layers by path, in execution order, and the paths of layers that no call reaches.

    Raises:
        UserError: There is no layer to quantize.
    """
    called: dict[nn.Module, int | None] = {}
    for span in trace.spans:
        if isinstance(span.module, QUANTIZABLE) and span.module not in called:
            called[span.module] = span.input
    readers: dict[int | None, ActivationQuantizer] = {}
    quantized: dict[nn.Module, QuantizedLayer] = {}
    ends = [next(iter(called), None), next(reversed(called), None)]
    for layer, value in called.items():
        # The first and the last layer have bits of their own, so they share with none.
        alone = value is None or layer in ends
        shared = ActivationQuantizer() if alone else readers.setdefault(value, ActivationQuantizer())
        quantized[layer] = QuantizedLayer(layer, shared)
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child in quantized and not isinstance(parent, QuantizedLayer):
                setattr(parent, name, quantized[child])  # type: ignore[index]
    if network in quantized:
        raise UserError(f"the network is a single {type(network).__name__}; allowed: a module with layers inside")
    if not quantized:
        kinds = ", ".join(kind.__name__ for kind in QUANTIZABLE)
        raise UserError(f"the network calls no layer that can be quantized; allowed: {kinds}")
    paths = {id(module): path for path, module in network.named_modules()}
    layers = {paths[id(quantized[layer])]: quantized[layer] for layer in called}
    inner = {id(layer) for layer in called}
    left_out = [p for p, m in network.named_modules() if isinstance(m, QUANTIZABLE) and id(m) not in inner]
    return layers, left_out
