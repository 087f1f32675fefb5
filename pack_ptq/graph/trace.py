"""Record the torch calls of one forward pass in order, with the data that flows between them.

The calls are seen by a `TorchFunctionMode`, so any Python control flow is allowed as long as it does not depend on the
data. A value is named by the index of the call that made it; the network's input is `INPUT`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from pack_ptq.errors import UserError
from pack_ptq.quant.products import QuantizedProduct

INPUT = -1
# Calls that multiply two tensors and sum over the products, with the names of their arguments in order.
MATRIX = ("input", "other")
FILTER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
SPREAD = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
OPERATIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "linalg_matmul", "mm", "bmm"), MATRIX),
    "linear": ("input", "weight", "bias"),
    **{f"conv{n}d": FILTER for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": SPREAD for n in (1, 2, 3)},
    **dict.fromkeys(("baddbmm", "addbmm", "addmm"), ("added", "input", "other")),
    "einsum": ("equation", "input", "other"),
    "bilinear": ("input", "other", "weight", "bias"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}
OTHER_NAMES = {"mat1": "input", "batch1": "input", "mat2": "other", "batch2": "other", "self": "input"}
# Calls that make Python values of data; a replay with placeholders before them could go another way unseen.
READS_DATA = {"__bool__", "__float__", "__index__", "__int__", "allclose", "equal", "item", "numpy", "tolist"}


@dataclass(frozen=True)
class Shape:
    """A tensor's form at any batch size: each dimension as (size at batch 2, size at batch 3)."""

    dims: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    def at(self, batch: int) -> tuple[int, ...]:
        """Give the shape at a batch size."""
        return tuple(two if two == three else two * batch // 2 for two, three in self.dims)


@dataclass(frozen=True)
class Source:
    """An argument that depends on the network's input: the value it is, or is one of the tensors of."""

    value: int


@dataclass
class Call:
    """One torch call.

    Attributes:
        name: Of the function, to notice a forward pass that takes another way.
        inputs: Values it reads that depend on the network's input.
        kind: Whether it gives tensors, nothing, or something else such as a size.
        output: Form of what it gives, with `Shape` in place of tensors.
        module: Path of the innermost module that made the call.
        layer: Path of the quantized layer, if the call is one.
        new: Nothing else aliases what it gives as an object.
        read: Places of the tensors that later calls read, if it gives several, as `max` over an axis does.
        product: Path of the quantized product, if the call is one.
        arguments: Of one of the `OPERATIONS`, by name, with `Source` in place of what depends on the input.
    """

    name: str
    inputs: tuple[int, ...]
    kind: Literal["tensor", "none", "other"]
    output: Any
    module: str
    layer: str | None
    new: bool
    product: str | None = None
    arguments: dict[str, Any] | None = None
    read: set[int] = field(default_factory=set)

    @property
    def place(self) -> int | None:
        """Where among the tensors it gives the only one lies that is read; nothing if there are several."""
        if isinstance(self.output, Shape):
            return 0
        return next(iter(self.read)) if len(self.read) == 1 else None

    @property
    def form(self) -> Shape | None:
        """Form of the only tensor it gives that is read; nothing if there are several."""
        return None if self.place is None else tree_leaves(self.output)[self.place]


@dataclass
class ModuleSpan:
    """One call of a module: the torch calls `first..last` were made inside it."""

    path: str
    module: nn.Module
    first: int
    last: int = -2
    input: int | None = None
    output: int | None = None


@dataclass
class Trace:
    """All calls of one forward pass, the calls of modules around them, and the value of the output.

    Attributes:
        calls: In order; a call's index is the name of the value it makes.
        spans: The calls of modules, by their start.
        output: The value the network gives.
        changed: Values that a later call overwrites in place, directly or through a view.
        parameters: Names of those that calls compute with, other than of quantized layers with their own.
    """

    calls: list[Call] = field(default_factory=list)
    spans: list[ModuleSpan] = field(default_factory=list)
    output: int = INPUT
    changed: set[int] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)

    def consumers(self, value: int) -> list[int]:
        """Give the calls that compute with a value; questions about its shape do not count."""
        return [i for i, call in enumerate(self.calls) if value in call.inputs and call.kind != "other"]


def call_name(function: Callable[..., Any]) -> str:
    """Name a torch function as the trace does."""
    return getattr(function, "__name__", repr(function))


def arguments_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name the arguments of one of the `OPERATIONS`; nothing if it has more of them than are known."""
    if len(args) > len(OPERATIONS[name]):
        return None
    # Of those that add to a product the input is what they add.
    others = OTHER_NAMES | ({"input": "added", "self": "added"} if OPERATIONS[name][0] == "added" else {})
    given = {others.get(key, key): value for key, value in kwargs.items()}
    return dict(zip(OPERATIONS[name], args, strict=False)) | given


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """Give where a tensor lies; while this reference lives nothing else gets the address, though the memory is free."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except NotImplementedError:  # a sparse tensor has none
        return None


def _form(leaf: Any) -> Any:
    """Give the shape of a tensor in one recording; see `_join`."""
    return Shape(tuple((n, n) for n in leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _check_call(name: str) -> None:
    """Refuse a call on data after which a replay, or a layer alone, could compute something else."""
    if name in READS_DATA:
        raise UserError(
            f"the network's forward pass reads its data as Python values ({name}), so its control flow may depend on "
            "the data; allowed: a fixed forward pass"
        )
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise UserError(
            "the network's forward pass runs under torch.autocast; allowed: one in float32, since layers are also run "
            "and fitted alone"
        )


class _Recorder(TorchFunctionMode):
    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.trace = Trace()
        self.paths = {id(module): path for path, module in network.named_modules()}
        self.names: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.stack: list[ModuleSpan] = []
        # Neither holds what the network itself lets go, or all activations would be in memory at once.
        self.values = WeakTensorKeyDictionary({x: INPUT})
        self.places = WeakTensorKeyDictionary()  # among the tensors of one call
        self.sharing: dict[StorageWeakRef | None, list[int]] = {}  # the values that lie in one storage
        self._note_storage(x, INPUT)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        inputs = tuple(dict.fromkeys(self.values[t] for t in tensors if t in self.values))
        if inputs:
            _check_call(call_name(func))
        versions = [(t, t._version) for t in tensors if not t.is_inference()]
        result = func(*args, **(kwargs or {}))
        for tensor, version in versions:
            if tensor._version != version:
                self.trace.changed.update(self.sharing.get(storage_of(tensor), ()))
        index = len(self.trace.calls)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        kind: Literal["tensor", "none", "other"] = "tensor" if outputs else "none" if result is None else "other"
        aliased = any(id(o) == id(t) for o in outputs for t in tensors)
        # A call that gives nothing has changed its first argument, as `x[i] = y` does.
        changed = outputs if outputs else tensors[:1] if kind == "none" else []
        if kind != "other":
            self.trace.parameters.update(name for t in tensors for name in self.names.get(id(t), ()))
        if inputs:
            if kind != "other":
                self._note_read(tensors)
            for tensor in changed:
                self.values[tensor] = index
                self.places.pop(tensor, None)
                self._note_storage(tensor, index)
            if not isinstance(result, Tensor):
                leaves = enumerate(tree_leaves(result))
                self.places.update({leaf: place for place, leaf in leaves if isinstance(leaf, Tensor)})
        name, module = call_name(func), self.stack[-1].path if self.stack else ""
        operation = next((a for a in args if isinstance(a, nn.Module)), None)
        path = None if operation is None else self.paths.get(id(operation))
        layer, product = (None, path) if isinstance(operation, QuantizedProduct) else (path, None)
        call = Call(name, inputs, kind, tree_map(_form, result), module, layer, not aliased, product)
        if inputs and name in OPERATIONS:
            call.arguments = tree_map(self._source, arguments_of(name, args, kwargs or {}))
        self.trace.calls.append(call)
        return result

    def _note_storage(self, tensor: Tensor, value: int) -> None:
        self.sharing.setdefault(storage_of(tensor), []).append(value)

    def _note_read(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor in self.places:
                self.trace.calls[self.values[tensor]].read.add(self.places[tensor])

    def _source(self, argument: Any) -> Any:
        is_value = isinstance(argument, Tensor) and argument in self.values
        return Source(self.values[argument]) if is_value else argument

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        source = next((self.values.get(a) for a in args if isinstance(a, Tensor)), None)
        span = ModuleSpan(self.paths[id(module)], module, len(self.trace.calls), input=source)
        self.trace.spans.append(span)
        self.stack.append(span)

    def leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        span = self.stack.pop()
        span.last = len(self.trace.calls) - 1
        span.output = self.values.get(result) if isinstance(result, Tensor) else None


def _record(network: nn.Module, x: Tensor) -> Trace:
    with torch.inference_mode(False):  # whose tensors count no versions
        x = x.clone()
    recorder = _Recorder(network, x)
    handles = []
    for module in network.modules():
        handles.append(module.register_forward_pre_hook(recorder.enter))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        with torch.inference_mode(False), torch.no_grad(), recorder:
            result = network(x)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(result, Tensor) or result not in recorder.values:
        raise UserError(
            f"the network's output is {type(result).__name__}; allowed: one tensor that is computed from the input"
        )
    recorder._note_read([result])
    recorder.trace.output = recorder.values[result]
    return recorder.trace


def _join(two: Shape, three: Shape) -> Shape:
    """Give the shape at any batch size from those of two recordings."""
    return Shape(tuple((a, b) for (a, _), (_, b) in zip(two.dims, three.dims, strict=True)), two.dtype)


def _names(trace: Trace) -> list[str]:
    return [call.name for call in trace.calls]


def batch_of(x: Tensor, size: int) -> Tensor:
    """Give the first `size` samples of `x`, repeated if there are fewer."""
    return torch.cat([x] * -(-size // len(x)))[:size]


def trace_network(network: nn.Module, example: Tensor) -> Trace:
    """Record a forward pass at two batch sizes, so that the shapes at any other are known.

    Args:
        network: In evaluation mode.
        example: One or more input samples, shape (batch, ...).

    Raises:
        UserError: The forward pass fails, takes another way at another batch size, or gives no single tensor.
    """
    try:
        trace, other = (_record(network, batch_of(example, size)) for size in (2, 3))
        if _names(trace) != _names(other):  # the first pass may have filled caches, as of attention's positions
            trace, other = (_record(network, batch_of(example, size)) for size in (2, 3))
    except UserError:
        raise
    except Exception as error:
        shape = tuple(batch_of(example, 2).shape)
        raise UserError(f"the network failed on an input of shape {shape}: {type(error).__name__}: {error}") from error
    if _names(trace) != _names(other):
        raise UserError(
            "the network's control flow depends on the batch size or the data; allowed: a fixed forward pass"
        )
    for call, twin in zip(trace.calls, other.calls, strict=True):
        if call.kind == "tensor":
            call.output = tree_map(
                lambda two, three: _join(two, three) if isinstance(two, Shape) else two, call.output, twin.output
            )
        else:
            call.output = None
    return trace
