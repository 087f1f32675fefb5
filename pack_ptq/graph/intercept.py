"""Let quantized operations take the place of torch calls that a network makes itself, as attention does.

A call is known by its ordinal among all calls of the `OPERATIONS` in a forward pass, which is fixed (see `trace`). The
calls are seen by a `TorchFunctionMode` around the network's forward, so its own code and the names of its modules stay
as they are.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pack_ptq.graph.trace import OPERATIONS, arguments_of, call_name
from pack_ptq.quant.layers import QuantizedLayer, run_quantized
from pack_ptq.quant.products import QuantizedProduct, run_product


class LayerSite:
    """A call with a constant weight, which a quantized layer computes.

    Args:
        layer: That computes it.
        operand: The argument that the layer reads.
        swapped: The weight is the left matrix, so the layer works on the transposed right one.
    """

    def __init__(self, layer: QuantizedLayer, operand: str = "input", swapped: bool = False) -> None:
        self.layer, self.operand, self.swapped = layer, operand, swapped

    def run(self, function: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        """Compute the call."""
        x = arguments[self.operand]
        return run_quantized(x.mT, self.layer).mT if self.swapped else run_quantized(x, self.layer)


class ProductSite:
    """A call of which both operands are activations."""

    def __init__(self, product: QuantizedProduct) -> None:
        self.product = product

    def run(self, function: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        """Compute the call."""
        return run_product(self.product, function, arguments)


Site = LayerSite | ProductSite


class _Interception(TorchFunctionMode):
    def __init__(self, sites: Mapping[int, Site]) -> None:
        super().__init__()
        self.sites, self.count = sites, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = call_name(func), kwargs or {}
        if name not in OPERATIONS:
            return func(*args, **kwargs)
        site = self.sites.get(self.count)
        self.count += 1
        if site is None:
            return func(*args, **kwargs)
        arguments = arguments_of(name, args, kwargs)
        assert arguments is not None
        return site.run(partial(_call, func, OPERATIONS[name]), arguments)


def _call(function: Callable[..., Tensor], names: tuple[str, ...], arguments: dict[str, Any]) -> Tensor:
    first = list(takewhile(arguments.__contains__, names))
    return function(*(arguments[key] for key in first), **{k: v for k, v in arguments.items() if k not in first})


class InterceptedForward:
    """A network's forward, some calls of which quantized operations compute.

    Args:
        network: Whose forward it is.
        sites: By ordinal of the call.
    """

    def __init__(self, network: nn.Module, sites: Mapping[int, Site]) -> None:
        self.forward, self.sites = network.forward, sites

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        with _Interception(self.sites):
            return self.forward(*args, **kwargs)
