"""Put quantized layers in the place of the convolutions and linear layers that a forward pass calls."""

from torch import nn

from pack_ptq.errors import UserError
from pack_ptq.graph.plain import is_plain
from pack_ptq.graph.trace import Trace
from pack_ptq.quant.layers import QUANTIZABLE, QuantizedLayer
from pack_ptq.quant.quantizers import ActivationQuantizer


def insert_quantized_layers(network: nn.Module, trace: Trace) -> None:
    """Wrap every quantizable layer that is called; layers that read the same tensor share its quantizer. In place.

    A layer that does not simply multiply its input by its weight, such as a convolution that standardises it, stays.

    Args:
        network: In evaluation mode, BatchNorm folded.
        trace: A recording of this network.

    Raises:
        UserError: The network is a layer itself.
    """
    called: dict[nn.Module, int | None] = {}
    for span in trace.spans:
        if isinstance(span.module, QUANTIZABLE) and span.module not in called and is_plain(span, trace):
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
    if isinstance(network, QUANTIZABLE):
        raise UserError(f"the network is a single {type(network).__name__}; allowed: a module with layers inside")
