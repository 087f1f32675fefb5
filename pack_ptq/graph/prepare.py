"""Make a trained network ready: a copy with BatchNorm folded, quantized layers in place, and its chain of blocks."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pack_ptq.errors import UserError
from pack_ptq.graph.blocks import HINT, find_chain
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.fold import fold_batch_norms
from pack_ptq.graph.insert import insert_quantized_layers
from pack_ptq.graph.trace import batch_of, trace_network
from pack_ptq.quant.layers import TRANSPOSED, QuantizedLayer

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Prepared:
    """A network ready for calibration.

    Attributes:
        chain: Its links; the prepared network is `chain.network`.
        folded: Paths of the BatchNorms that are gone.
        left_out: Paths of quantizable layers that no call reaches and that stay in full precision.
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
    untouched = trace_network(network, example)
    with torch.no_grad():
        expected = network(example)
    folded = fold_batch_norms(network, untouched)
    layers, left_out = insert_quantized_layers(network, trace_network(network, example))
    trace = trace_network(network, example)
    _note_sizes(network, layers, example)
    for in_place in (True, False):
        elements = find_chain(trace, blocks, in_place)
        chain = Chain(network, trace, elements, layers, tuple(example.shape[1:]))
        if _agrees(chain, example, expected):
            _use_channels_last(chain, example, expected)
            return Prepared(chain, tuple(folded), tuple(left_out))
    raise UserError(f"the network run block by block gives another output than the network itself; {HINT}")


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
def _note_sizes(network: nn.Module, layers: dict, example: Tensor) -> None:
    """Note how many input elements one sample brings to each layer, and how many multiplications it needs there."""
    counts = {path: [0, 0] for path in layers}

    def count(path: str, layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        # Each output element of a convolution is a sum over one filter; in a transposed one, each input element is
        # spread by one.
        spread = isinstance(layer.layer, TRANSPOSED)
        elements = (x if spread else output).numel() // len(example)
        counts[path][0] += x.numel() // len(example)
        counts[path][1] += elements * (layer.weight.numel() // max(1, layer.weight.shape[0]))

    handles = [
        layer.register_forward_hook(lambda layer, args, output, path=path: count(path, layer, args[0], output))
        for path, layer in layers.items()
    ]
    network(example)
    for handle in handles:
        handle.remove()
    for path, layer in layers.items():
        layer.input_elements, layer.macs = counts[path]
