"""Find the operations that a network computes outside its layers, and give each call site its quantizers."""

from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn

from pack_ptq.graph.intercept import InterceptedForward, LayerSite, ProductSite, Site
from pack_ptq.graph.trace import OPERATIONS, Call, Source, Trace
from pack_ptq.quant.layers import QUANTIZABLE, QuantizedLayer
from pack_ptq.quant.products import QuantizedAttention, QuantizedProduct
from pack_ptq.quant.quantizers import ActivationQuantizer, Role
from pack_ptq.quant.row_observer import RowObserver

Operation = TypeVar("Operation", bound=nn.Module)
# Calls that hand on the values they are given, in another form or order.
PASSING = {"clone", "contiguous", "dropout", "expand", "flatten", "float", "permute", "repeat_interleave", "reshape",
           "roll", "squeeze", "to", "transpose", "type_as", "unsqueeze", "view", "__get__", "__getitem__"}  # fmt: skip
ROLES: dict[str, Role] = {"softmax": "softmax", "_softmax": "softmax", "gelu": "gelu"}
MATRICES = ("matmul", "__matmul__", "linalg_matmul", "mm")
# The axis that a product sums over, by operand.
SUMMED = {
    **{name: {"input": -1, "other": -2} for name in (*MATRICES, "bmm", "baddbmm", "addbmm", "addmm")},
    "__rmatmul__": {"input": -2, "other": -1},
    "linear": {"input": -1, "weight": -1},
}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Calls that compute with weights in a way that nothing here quantizes.
UNCOVERED = {"bilinear", "convolution", "embedding_bag", "gru", "gru_cell", "inner", "lstm", "lstm_cell",
             "multi_head_attention_forward", "mv", "rnn_relu", "rnn_tanh", "tensordot"}  # fmt: skip
CONVOLUTIONS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d, "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d, "conv_transpose3d": nn.ConvTranspose3d,
}  # fmt: skip


def intercept_operations(network: nn.Module, trace: Trace) -> list[str]:
    """Put a quantized operation at every call of the `OPERATIONS` that `trace` shows; in place.

    A linear call, a convolution or a product of matrices with a constant weight gets a quantized layer. If a layer owns
    that weight and is never called itself, it is that one, as in torchvision's Swin; else a new one beside the calling
    module's children, as for convolutions with standardised weights. Any other call gets a quantized product with a
    quantizer for each operand.

    Args:
        network: With its quantized layers in place, whose own calls are not seen.
        trace: A recording of this network.

    Returns:
        What stays in full precision, as `path (call)`.
    """
    modules = dict(network.named_modules())
    called = {span.path for span in trace.spans}
    owners = {
        id(module.weight): path
        for path, module in modules.items()
        if isinstance(module, QUANTIZABLE) and path not in called
    }
    sites: dict[int, Site] = {}
    left_out = []
    counted = [call for call in trace.calls if call.name in OPERATIONS]
    for ordinal, call in enumerate(counted):
        if not call.inputs:
            if isinstance(modules[call.module], QUANTIZABLE):  # of positions, as in Swin V2; computed once at most
                left_out.append(f"{call.module} ({call.name} of constants)")
            continue
        parent = _parent(modules, call)
        site: Site | None = None
        if parent is not None and call.arguments is not None:
            site = _layer_site(parent, modules, owners, call) or _product_site(parent, trace, call)
        if site is None:
            left_out.append(f"{call.module} ({call.name})")
        else:
            sites[ordinal] = site
    if sites:
        network.forward = InterceptedForward(network, sites)
    uncovered = (call for call in trace.calls if call.name in UNCOVERED - set(OPERATIONS) and call.inputs)
    return left_out + [f"{call.module} ({call.name})" for call in uncovered]


def note_roles(layers: Mapping[str, QuantizedLayer], trace: Trace) -> None:
    """Tell the input quantizers of layers what their values come of, where that is the same at all their calls."""
    found: dict[ActivationQuantizer, list[tuple[Role, int | None]]] = {}
    for call in trace.calls:
        if call.layer is not None:
            layer = layers[call.layer]
            summed = -1 if isinstance(layer.layer, nn.Linear) else None
            found.setdefault(layer.input_quantizer, []).append((_role(trace, call.inputs[0]), summed))
    for quantizer, calls in found.items():
        roles, axes = {role for role, _ in calls}, [axis for _, axis in calls if axis is not None]
        _note_role(quantizer, roles.pop() if len(roles) == 1 else "any", axes[0] if axes else None)


def _role(trace: Trace, value: int) -> Role:
    """Tell what a value comes of."""
    while value >= 0 and trace.calls[value].name in PASSING and trace.calls[value].inputs:
        value = trace.calls[value].inputs[0]
    return ROLES.get(trace.calls[value].name, "any") if value >= 0 else "any"


def _note_role(quantizer: ActivationQuantizer, role: Role, summed: int | None) -> None:
    """Tell a quantizer what its values come of, and along which axis they are summed, where that is known."""
    quantizer.role = role
    if role == "softmax" and summed is not None:
        quantizer.rows = RowObserver(summed)


def _layer_site(parent: nn.Module, modules: dict[str, nn.Module], owners: dict[int, str], call: Call) -> Site | None:
    arguments: dict[str, Any] = call.arguments or {}
    x, weight, bias = arguments.get("input"), arguments.get("weight"), arguments.get("bias")
    if call.name in MATRICES:
        other = arguments.get("other")
        if isinstance(x, Source) and _is_matrix(other):
            return LayerSite(_add(parent, "linear", QuantizedLayer(_linear(other.T, None), ActivationQuantizer())))
        if isinstance(other, Source) and _is_matrix(x) and len(call.output.dims) > 1:
            layer = _add(parent, "linear", QuantizedLayer(_linear(x, None), ActivationQuantizer()))
            return LayerSite(layer, "other", swapped=True)
        return None
    if not isinstance(x, Source) or not isinstance(weight, Tensor) or isinstance(bias, Source):
        return None
    if id(weight) in owners and _is_as_set(modules[owners[id(weight)]], call, weight):
        return LayerSite(_owner(modules, owners[id(weight)], bias))
    if call.name == "linear" and _is_matrix(weight):
        return LayerSite(_add(parent, "linear", QuantizedLayer(_linear(weight, bias), ActivationQuantizer())))
    if call.name in CONVOLUTIONS:
        layer = QuantizedLayer(_convolution(call, weight, bias), ActivationQuantizer())
        return LayerSite(_add(parent, "conv", layer))
    return None


def _is_matrix(weight: Any) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.ndim == 2


def _is_as_set(module: nn.Module, call: Call, weight: Tensor) -> bool:
    """Tell whether a call with a layer's weight has the stride, padding and so on of the layer."""
    layer: Any = module.layer if isinstance(module, QuantizedLayer) else module
    if call.name not in CONVOLUTIONS:
        return isinstance(layer, nn.Linear)
    if not isinstance(layer, CONVOLUTIONS[call.name]) or layer.padding_mode != "zeros":
        return False
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
    given = usual | {name: value for name, value in (call.arguments or {}).items() if name in usual}
    sides = weight.ndim - 2
    return all(_spread(value, sides) == _spread(getattr(layer, name), sides) for name, value in given.items())


def _spread(value: Any, sides: int) -> Any:
    """Give a setting of a convolution for each side, where one number stands for all."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * sides


def _owner(modules: dict[str, nn.Module], path: str, bias: Tensor | None) -> QuantizedLayer:
    """Give the quantized layer in the place of one that is never called, and put it there at its first use."""
    module: Any = modules[path]
    if isinstance(module, QuantizedLayer):
        return module
    if bias is not module.bias:  # computed from the layer's own, as in Swin V2
        module.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    modules[path] = layer = QuantizedLayer(module, ActivationQuantizer())
    parent, _, name = path.rpartition(".")
    setattr(modules[parent], name, layer)
    return layer


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    _fill(layer, weight, bias)
    return layer


def _convolution(call: Call, weight: Tensor, bias: Tensor | None) -> nn.Module:
    given = {name: value for name, value in (call.arguments or {}).items() if name not in ("input", "weight", "bias")}
    groups = given.get("groups", 1)
    kind = CONVOLUTIONS[call.name]
    out_axis = 1 if "transpose" in call.name else 0
    channels = [weight.shape[0], weight.shape[1]]
    channels[1] *= groups
    outs, ins = (channels[1], channels[0]) if out_axis else (channels[0], channels[1])
    layer = kind(ins, outs, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **given)
    _fill(layer, weight, bias)
    return layer


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    # Clones, since the layer's scales and biases are moved when the network is tuned.
    layer.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    layer.eval()


def _product_site(parent: nn.Module, trace: Trace, call: Call) -> Site | None:
    arguments: dict[str, Any] = call.arguments or {}
    if call.name == "scaled_dot_product_attention":
        return ProductSite(_add(parent, "attention", QuantizedAttention()))
    second = "weight" if "weight" in arguments else "other"
    operands = {name: arguments.get(name) for name in ("input", second)}
    if call.name in UNCOVERED or not all(isinstance(operand, Source | Tensor) for operand in operands.values()):
        return None
    constant = [name for name, operand in operands.items() if isinstance(operand, Tensor)]
    product = _add(parent, call.name.strip("_"), QuantizedProduct(tuple(operands), constant))
    for name, operand in operands.items():
        if isinstance(operand, Source):
            _note_role(product.quantizers[name], _role(trace, operand.value), _summed(call, name))
    return ProductSite(product)


def _summed(call: Call, operand: str) -> int | None:
    """Give the axis of an operand that the product sums over, counted from the last, if it is one and is known."""
    if call.name != "einsum" or call.arguments is None:
        return SUMMED.get(call.name, {}).get(operand)
    terms, arrow, output = str(call.arguments["equation"]).replace(" ", "").partition("->")
    letters = terms.split(",")[0 if operand == "input" else 1]
    summed = [letter for letter in letters if letter.isalpha() and letter not in output]
    if not arrow or len(summed) != 1 or "." in letters.partition(summed[0])[2]:
        return None
    return letters.index(summed[0]) - len(letters)


def _parent(modules: dict[str, nn.Module], call: Call) -> nn.Module | None:
    """Give the module that makes the call, or the first around it that does not iterate over its children."""
    path = call.module
    while path and isinstance(modules[path], CONTAINERS):
        path = path.rpartition(".")[0]
    return None if isinstance(modules[path], CONTAINERS) else modules[path]


def _add(parent: nn.Module, kind: str, operation: Operation) -> Operation:
    """Make the operation a child of a module, so that devices and states reach it."""
    number = 0
    while hasattr(parent, f"{kind}_{number}"):
        number += 1
    parent.add_module(f"{kind}_{number}", operation)
    return operation
