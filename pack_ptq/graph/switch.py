"""Turn the quantizers of layers and products on and off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.products import QuantizedProduct
from pack_ptq.quant.quantizers import WeightMode

Operations = Iterable[QuantizedLayer | QuantizedProduct]


def switch(operations: Operations, weights: WeightMode, activations: bool) -> None:
    """Set how weights are computed and whether inputs are quantized."""
    for operation in operations:
        if isinstance(operation, QuantizedLayer):
            operation.weight_quantizer.mode = weights
        for quantizer in operation.quantizers.values():
            quantizer.enabled = activations


@contextmanager
def quantized(operations: Operations, weights: WeightMode) -> Iterator[None]:
    """Quantize weights and inputs inside the `with`, and nothing after it."""
    operations = list(operations)
    switch(operations, weights, activations=True)
    try:
        yield
    finally:
        switch(operations, "off", activations=False)
