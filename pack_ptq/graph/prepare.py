"""Make a trained network ready: a copy with BatchNorm folded, quantized layers in place, and its chain of blocks."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pack_ptq.errors import UserError
from pack_ptq.graph.blocks import HINT, find_chain
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.decompose import decompose_attention
from pack_ptq.graph.fold import fold_batch_norms
from pack_ptq.graph.insert import insert_quantized_layers
from pack_ptq.graph.operations import intercept_operations, note_roles
from pack_ptq.graph.trace import Trace, batch_of, trace_network
from pack_ptq.quant.layers import QUANTIZABLE, QuantizedLayer
from pack_ptq.quant.products import QuantizedProduct

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Prepared:
    """A network ready for calibration.

    Attributes:
        chain: Its links; the prepared network is `chain.network`.
        folded: Paths of the BatchNorms that are gone.
        left_out: What stays in full precision: quantizable layers that no call reaches, by path, and operations that
            no quantizer covers, as `path (call)`.
    """

    chain: Chain
    folded: tuple[str, ...]
    left_out: tuple[str, ...]


def prepare(network: nn.Module, example: Tensor, blocks: str | list[str] | None = None) -> Prepared:
    """Prepare a copy of a network; all quantizers are off, so it computes what the network computes.

    Args:
        network: Trained; it is left as it is.
        example: One or more real input samples, shape (batch, ...), on the network's device.
        blocks: Names or patterns of the modules that are to be blocks, instead of the search.

    Raises:
        UserError: The network cannot be run, chained or copied; the message names the override to use.
    """
    try:
        network = copy.deepcopy(network).eval().requires_grad_(False)
    except Exception as error:
        raise UserError(f"the network cannot be copied ({error}); allowed: modules that copy.deepcopy takes") from error
    for module in network.modules():
        # A layer that overwrites its input would overwrite cached activations.
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
    example = batch_of(example, 2)
    with torch.no_grad():
        untouched, expected = trace_network(network, example), network(example)
    if decompose_attention(network, example):
        untouched = trace_network(network, example)
    folded = fold_batch_norms(network, untouched)
    insert_quantized_layers(network, trace_network(network, example))
    uncovered = intercept_operations(network, trace_network(network, example))
    trace = trace_network(network, example)
    layers, products = _called(network, trace)
    note_roles(layers, trace)
    left_out = [*_unreached(network, trace), *uncovered]
    _note_sizes(network, layers, products, example)
    for in_place in (True, False):
        elements = find_chain(trace, blocks, in_place)
        chain = Chain(network, trace, elements, layers, products, tuple(example.shape[1:]))
        if _agrees(chain, example, expected):
            _use_channels_last(chain, example, expected)
            return Prepared(chain, tuple(folded), tuple(left_out))
    raise UserError(f"the network run block by block gives another output than the network itself; {HINT}")


def _called(network: nn.Module, trace: Trace) -> tuple[dict[str, QuantizedLayer], dict[str, QuantizedProduct]]:
    """Give the quantized layers and products by path, in execution order.

    Raises:
        UserError: There is no layer to quantize.
    """
    modules = dict(network.named_modules())
    layers = {call.layer: modules[call.layer] for call in trace.calls if call.layer is not None}
    products = {call.product: modules[call.product] for call in trace.calls if call.product is not None}
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in QUANTIZABLE)
        raise UserError(f"the network calls no layer that can be quantized; allowed: {kinds}")
    return layers, products  # type: ignore[return-value]


def _unreached(network: nn.Module, trace: Trace) -> list[str]:
    """Give the quantizable layers that no call reaches."""
    reached = {span.module for span in trace.spans}
    wrapped = {module.layer for module in network.modules() if isinstance(module, QuantizedLayer)}
    layers = [(path, module) for path, module in network.named_modules() if isinstance(module, QUANTIZABLE)]
    return [path for path, module in layers if module not in reached and module not in wrapped]


def _use_channels_last(chain: Chain, example: Tensor, expected: Tensor) -> None:
    """Lay convolutions out channels last, which is faster, if the network's own `view` calls bear it."""
    _lay_out(chain.network, torch.channels_last)
    if not _agrees(chain, example, expected):
        _lay_out(chain.network, torch.contiguous_format)


def _lay_out(network: nn.Module, layout: torch.memory_format) -> None:
    # Not `network.to(memory_format=...)`, which fails at the five axes of a Conv3d's weight.
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=layout)


@torch.no_grad()
def _agrees(chain: Chain, x: Tensor, expected: Tensor) -> bool:
    try:
        for index in range(len(chain)):
            x = chain.run(x, index, index + 1)
    except (RuntimeError, UserError):
        return False
    return bool((x - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1))


@torch.no_grad()
def _note_sizes(
    network: nn.Module, layers: dict[str, QuantizedLayer], products: dict[str, QuantizedProduct], example: Tensor
) -> None:
    """Note how many input elements one sample brings to each operation, and its multiplications."""
    operations: list[QuantizedLayer | QuantizedProduct] = [*layers.values(), *products.values()]
    for operation in operations:
        operation.counting = len(example)
    network(example)
    for operation in operations:
        operation.counting = None
