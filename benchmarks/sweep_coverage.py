"""Which matrix products and convolutions a prepared network really executes, and which of them are quantized.

The products are seen where PyTorch dispatches them, below all that the preparation itself looks at, and what depends on
the network's input is followed through the storages of the tensors.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pack_ptq.graph.trace import storage_of
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.products import QuantizedAttention, QuantizedProduct

aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]


def _recurrent(x: Tensor, *weights: Any, **__: Any) -> int:
    return math.prod(x.shape[:-1]) * sum(w.numel() for w in weights if isinstance(w, Tensor) and w.ndim == 2)


# What the counter of FLOPs of PyTorch does not know, in multiplications.
FURTHER: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_attention_math: _attention,
    aten.linear: lambda x, weight, *_, **__: math.prod(x.shape[:-1]) * weight.numel(),
    aten.mv: lambda matrix, *_, **__: matrix.numel(),
    aten.addmv: lambda x, matrix, *_, **__: matrix.numel(),
    aten.dot: lambda x, *_, **__: x.numel(),
    aten._trilinear: lambda a, b, c, *_, **__: max(a.numel(), b.numel(), c.numel()),
    aten.mkldnn_rnn_layer: _recurrent,
}


class Coverage(TorchDispatchMode):
    """Count the multiplications of products inside and outside of quantized operations.

    Attributes:
        macs: By `quantized`, `outside`, and `constant` for those that do not depend on the network's input.
        outside: Module and kind of the products that depend on the input and are not quantized.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.network = network
        self.macs = {"quantized": 0, "outside": 0, "constant": 0}
        self.outside: dict[tuple[str, str], int] = {}
        self.inside = 0
        self.stack = [""]
        self.reached = {storage_of(x)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        depends = any(storage_of(t) in self.reached for t in tensors)
        if depends:
            changed = tensors[:1] if func._schema.is_mutable else []
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.reached.update(storage_of(t) for t in (*outputs, *changed))
        macs = _multiplications(func._overloadpacket, args, kwargs, result)
        if macs:
            where = "quantized" if self.inside else "outside" if depends else "constant"
            self.macs[where] += macs
            if where == "outside":
                key = (self.stack[-1], str(func._overloadpacket).removeprefix("aten."))
                self.outside[key] = self.outside.get(key, 0) + macs
        return result


def _multiplications(packet: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    if packet in FURTHER:
        return FURTHER[packet](*args, **kwargs)
    return flop_registry[packet](*args, **kwargs, out_val=result) // 2 if packet in flop_registry else 0


def _quantizes(operation: QuantizedLayer | QuantizedProduct) -> bool:
    weight = not isinstance(operation, QuantizedLayer) or operation.weight_quantizer.mode != "off"
    return weight and all(quantizer.is_active for quantizer in operation.quantizers.values())


@contextmanager
def _marked(coverage: Coverage) -> Iterator[None]:
    """Let the coverage know when a quantized operation computes, and in which module the network is."""
    kinds = (QuantizedLayer, QuantizedProduct, QuantizedAttention)
    originals = [kind.compute for kind in kinds]

    def marking(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(operation: Any, *args: Any) -> Tensor:
            active = _quantizes(operation)
            coverage.inside += active
            try:
                return original(operation, *args)
            finally:
                coverage.inside -= active

        return compute

    handles = []
    for path, module in coverage.network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: coverage.stack.append(path)))
        handles.append(module.register_forward_hook(lambda *_: coverage.stack.pop() and None))
    for kind, original in zip(kinds, originals, strict=True):
        kind.compute = marking(original)
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.compute = original
        for handle in handles:
            handle.remove()


@torch.no_grad()
def executed_products(network: nn.Module, x: Tensor) -> Coverage:
    """Run a prepared network, its quantizers on, and tell which products it executed."""
    coverage = Coverage(network, x)
    with _marked(coverage), coverage:
        network(x)
    return coverage


def unlisted(coverage: Coverage, left_out: tuple[str, ...]) -> list[str]:
    """Give the products outside of quantized operations that a list of what is left out does not name."""
    listed = {entry.split(" (")[0] for entry in left_out}
    return [f"{path} ({kind})" for path, kind in coverage.outside if path not in listed]
