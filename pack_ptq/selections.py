"""Which calls of a network pick by index, as the sampling and grouping of points do, and by which numbers they pick."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.graph.trace import Call


@dataclass(frozen=True)
class Selection:
    """The calls of one function in one module that make indices of numbers.

    Attributes:
        call: Name of the function, such as `knn` or `topk`.
        module: Path of the innermost module that makes the call, empty for the network itself.
        full_precision: The numbers are bit for bit those of the full-precision network, as coordinates are that are
            handed on; else they come out of quantized layers, though no quantizer rounds them here.
    """

    call: str
    module: str
    full_precision: bool


@torch.no_grad()
def find_selections(chain: Chain, x: Tensor) -> list[Selection]:
    """Run a network in full precision and with hard codes, and compare what its selections read.

    A selection is any call that makes integers of floating-point numbers, or a mask that is then used with integers;
    the network's own functions count like those of torch. Indices that nothing reads, as of `max`, do not count.

    Args:
        chain: The network with hard codes; all its quantizers are off afterwards.
        x: A few inputs, shape (batch, ...), on any device.

    Returns:
        The selections in order, those that differ in no attribute once; none for networks that pick nothing.
    """
    x = x.to(next(chain.network.parameters()).device)
    switch(chain.operations, "off", activations=False)
    full = _watch(chain, x)
    with quantized(chain.operations, "hard"):
        low = _watch(chain, x)
    found = []
    for index, numbers in full.items():
        call = chain.trace.calls[index]
        same = all(torch.equal(a, b) for a, b in zip(numbers, low[index], strict=True))
        found.append(Selection(call.name, call.module, same))
    return list(dict.fromkeys(found))


def _watch(chain: Chain, x: Tensor) -> dict[int, list[Tensor]]:
    """Give the numbers that each selection reads, by the index of its call."""
    watch = _Watch(chain.trace.calls)
    with watch:
        chain.network(x)
    return {index: numbers for index, numbers in watch.read.items() if index in watch.used}


class _Watch(TorchFunctionMode):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls, self.index = calls, -1
        self.read: dict[int, list[Tensor]] = {}
        self.used: set[int] = set()
        self.makers: dict[int, int] = {}
        self.alive: list[Tensor] = []  # an id is only good while its object lives

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.index += 1
        result = func(*args, **(kwargs or {}))
        taken, given = _tensors((args, kwargs or {})), _tensors(result)
        if any(tensor.dtype != torch.bool and not tensor.is_floating_point() for tensor in taken + given):
            self.used |= {self.makers[id(tensor)] for tensor in taken if id(tensor) in self.makers}
        numbers = [tensor for tensor in taken if tensor.is_floating_point()]
        picks = [tensor for tensor in given if not tensor.is_floating_point()]
        if self.calls[self.index].inputs and numbers and picks:
            self.read[self.index] = [tensor.clone() for tensor in numbers]
            self.makers |= {id(tensor): self.index for tensor in picks}
            self.alive += picks
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
