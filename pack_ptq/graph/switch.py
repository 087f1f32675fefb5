"""Turn the quantizers of layers on and off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.quantizers import WeightMode


def switch(layers: Iterable[QuantizedLayer], weights: WeightMode, activations: bool) -> None:
    """Set how weights are computed and whether inputs are quantized."""
    for layer in layers:
        layer.weight_quantizer.mode = weights
        layer.input_quantizer.enabled = activations


@contextmanager
def quantized(layers: Iterable[QuantizedLayer], weights: WeightMode) -> Iterator[None]:
    """Quantize weights and inputs inside the `with`, and nothing after it."""
    layers = list(layers)
    switch(layers, weights, activations=True)
    try:
        yield
    finally:
        switch(layers, "off", activations=False)
