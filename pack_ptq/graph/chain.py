"""Run a part of a network from a cached value: the calls before it are skipped, those after it never happen."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pack_ptq.errors import UserError
from pack_ptq.graph.blocks import Element
from pack_ptq.graph.trace import INPUT, Call, Shape, Trace, call_name
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.products import QuantizedProduct, operand_quantizers
from pack_ptq.quant.quantizers import ActivationQuantizer


class _ReachedStop(BaseException):  # no Exception, which a network may catch
    """The last wanted call has run."""


class _Replay(TorchFunctionMode):
    """Skip calls up to one whose value is given, run the rest, and note the wanted values on the way."""

    def __init__(
        self, trace: Trace, start: int, value: Tensor, stop: int, wanted: Collection[int], changed: Collection[int]
    ) -> None:
        super().__init__()
        self.calls, self.start, self.value, self.stop = trace.calls, start, value, stop
        self.wanted, self.changed = wanted, changed
        self.found: dict[int, Tensor] = {}
        self.index = -1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.stop in self.found:  # a context manager of the network is left, as `torch.no_grad`
            return func(*args, **(kwargs or {}))
        self.index = index = self.index + 1
        if index >= len(self.calls) or self.calls[index].name != call_name(func):
            raise UserError(
                "the network's forward pass took another way than when it was prepared; allowed: a fixed one"
            )
        call = self.calls[index]
        if index < self.start and call.inputs and call.kind != "other":
            return tree_map(self._placeholder, call.output)
        result = self._given(call) if index == self.start else func(*args, **(kwargs or {}))
        if index in self.wanted:
            # What was collected must not change when the network goes on in place.
            self.found[index] = _read(call, result).clone() if index in self.changed else _read(call, result)
        if index == self.stop:
            self.found[index] = _read(call, result)
            raise _ReachedStop
        return result

    def _given(self, call: Call) -> Any:
        """Give the value as what its call gives: alone, or among tensors that nothing reads."""
        leaves, form = tree_flatten(tree_map(self._placeholder, call.output))
        leaves[call.place or 0] = self.value
        return tree_unflatten(leaves, form)

    def _placeholder(self, form: Any) -> Any:
        if not isinstance(form, Shape):
            return form
        return torch.zeros((), dtype=form.dtype, device=self.value.device).expand(form.at(len(self.value)))


def _read(call: Call, result: Any) -> Tensor:
    """Give what the network reads of what a call gives."""
    return tree_leaves(result)[call.place or 0]


class Chain:
    """A network as links in execution order, any run of which can be computed alone.

    Boundary `i` is the value that link `i` reads; boundary 0 is the network's input and the last one its output.

    Args:
        network: The prepared network.
        trace: A recording of it.
        elements: Its links, as `find_chain` gives them.
        layers: Its quantized layers by path, in execution order.
        products: Its quantized products of activations, likewise.
        input_shape: Form of one input sample.
    """

    def __init__(
        self,
        network: nn.Module,
        trace: Trace,
        elements: Sequence[Element],
        layers: Mapping[str, QuantizedLayer],
        products: Mapping[str, QuantizedProduct],
        input_shape: tuple[int, ...],
    ) -> None:
        self.network, self.trace, self.elements = network, trace, tuple(elements)
        self.layers, self.products = dict(layers), dict(products)
        self.input_shape = input_shape
        self._values = [INPUT, *[element.stop for element in elements]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the links."""
        return tuple(element.name for element in self.elements)

    def __len__(self) -> int:
        return len(self.elements)

    def form_behind(self, link: int) -> Shape:
        """Give the form of the value that a link gives."""
        form = self.trace.calls[self.elements[link].stop].form
        assert form is not None
        return form

    def layers_of(self, start: int, stop: int) -> dict[str, QuantizedLayer]:
        """Give the quantized layers of the links `start..stop-1` by path."""
        return {path: self.layers[path] for element in self.elements[start:stop] for path in element.layers}

    def products_of(self, start: int, stop: int) -> dict[str, QuantizedProduct]:
        """Give the quantized products of the links `start..stop-1` by path."""
        return {path: self.products[path] for element in self.elements[start:stop] for path in element.products}

    @property
    def operations(self) -> list[QuantizedLayer | QuantizedProduct]:
        """All quantized layers and products."""
        return self.operations_of(0, len(self))

    def operations_of(self, start: int, stop: int) -> list[QuantizedLayer | QuantizedProduct]:
        """Give the quantized layers and products of the links `start..stop-1`."""
        return [*self.layers_of(start, stop).values(), *self.products_of(start, stop).values()]

    @property
    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """The quantizers of all activations, by name."""
        return self.quantizers_of(0, len(self))

    def quantizers_of(self, start: int, stop: int) -> dict[str, ActivationQuantizer]:
        """Give the quantizers of activations of the links `start..stop-1`.

        That of a layer's input has the layer's path as its name, that of a product's operand `path.operand`. Several
        names may have the same quantizer.
        """
        return {
            **{path: layer.input_quantizer for path, layer in self.layers_of(start, stop).items()},
            **operand_quantizers(self.products_of(start, stop)),
        }

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute the links `start..stop-1` on boundary `start`.

        Args:
            x: Value of boundary `start`, shape (batch, ...).
            start: First link, from 0.
            stop: Link after the last one; without it the run goes to the network's output.

        Returns:
            Value of boundary `stop`.
        """
        stop = len(self) if stop is None else stop
        return self.run_collecting(x, start, stop, ())[stop]

    def run_collecting(self, x: Tensor, start: int, stop: int, wanted: Collection[int]) -> dict[int, Tensor]:
        """Compute like `run` and give the values of all `wanted` boundaries on the way, and of `stop`."""
        if start == stop:
            return {stop: x}
        values = {self._values[boundary]: boundary for boundary in (*wanted, stop) if boundary > start}
        found = self._replay(x, start, self._values[stop], values.keys())
        return {values[value]: tensor for value, tensor in found.items()}

    def layer_input(self, x: Tensor, start: int, path: str) -> Tensor:
        """Compute the links from boundary `start` on up to a layer after it, and give what the layer reads.

        Args:
            x: Value of boundary `start`, shape (batch, ...).
            start: First link, from 0.
            path: Of a quantized layer that is called once.
        """
        call = next(index for index, call in enumerate(self.trace.calls) if call.layer == path)
        # The value's own call may give several tensors, of which the layer reads one, as after `chunk`.
        layer = self.layers[path]
        read: list[Tensor] = []
        layer.inputs = read
        try:
            self._replay(x, start, call, ())
        finally:
            layer.inputs = None
        return read[0]

    def _replay(self, x: Tensor, start: int, stop: int, wanted: Collection[int]) -> dict[int, Tensor]:
        if self._values[start] in self.trace.changed:
            x = x.clone()
        replay = _Replay(self.trace, self._values[start], x, stop, wanted, self.trace.changed)
        head = x if start == 0 else x.new_zeros(()).expand(len(x), *self.input_shape)
        try:
            with replay:
                self.network(head)
        except _ReachedStop:
            pass
        return replay.found
