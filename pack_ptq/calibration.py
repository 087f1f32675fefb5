"""Ranges of all quantizers, from all calibration batches."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pack_ptq.distributed import all_reduce
from pack_ptq.errors import UserError, refuse
from pack_ptq.graph.chain import Chain
from pack_ptq.quant.channel_observer import ChannelObserver
from pack_ptq.types import BitPlan, Recipe

PASSES = ("extremes", "values")


def watch(chain: Chain, what: str | None) -> None:
    """Let all input quantizers look at their inputs in one of the two `PASSES`, or stop them."""
    for quantizer in chain.quantizers.values():
        quantizer.watching = what  # type: ignore[assignment]


def watch_channels(chain: Chain) -> None:
    """Let the passes see every channel of what linear layers read, as far as channels are not seen for another end."""
    seen = {q for q in chain.quantizers.values() if q.channels is not None}
    for layer in chain.layers.values():
        if isinstance(layer.layer, nn.Linear) and layer.input_quantizer not in seen:
            layer.input_quantizer.channels = ChannelObserver()


def merge_observers(chain: Chain, what: str) -> None:
    """Merge what the processes have seen in one of the `PASSES`, and check it.

    Raises:
        UserError: A layer's input holds NaN or infinity; the message names the layer.
    """
    if what == "extremes":
        for layer in chain.layers.values():
            total, count = all_reduce(layer.seen.total), all_reduce(layer.seen.count)
            layer.input_mean = (total / count).to(layer.weight) if count else None
    # In the same order in every process, which a set's is not; an observer of several quantizers is merged once.
    ranged = dict.fromkeys(o for q in chain.quantizers.values() for o in (q.observer, q.channels) if o is not None)
    if what == "values":
        for observer in (*ranged, *dict.fromkeys(q.rows for q in chain.quantizers.values() if q.rows is not None)):
            observer.histogram = all_reduce(observer.histogram)
        return
    for observer in ranged:
        # A minimum over processes need not hand on NaN, but it does infinity.
        low = observer.low.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        high = observer.high.nan_to_num(torch.inf, torch.inf, -torch.inf)
        observer.low, observer.high = all_reduce(low, "min"), all_reduce(high, "max")
    for path, quantizer in chain.quantizers.items():
        if quantizer.observer.low == -torch.inf or quantizer.observer.high == torch.inf:
            raise UserError(f"the input of layer {path} holds NaN or infinity; allowed: finite activations")


@torch.no_grad()
def observe(chain: Chain, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> None:
    """Run both passes over the calibration inputs.

    Args:
        chain: The prepared network; its quantizers stay off.
        batches: Inputs of shape (batch, ...), or pairs of inputs and labels; iterated twice, so no generator.

    Raises:
        UserError: `batches` can be iterated only once, or a layer's input holds NaN or infinity.
    """
    if iter(batches) is batches:
        raise refuse("batches", type(batches).__name__, "what can be iterated twice, such as a list or a DataLoader")
    watch_channels(chain)
    for what in PASSES:
        watch(chain, what)
        for batch in batches:
            chain.network(batch[0] if isinstance(batch, tuple | list) else batch)
        watch(chain, None)
        merge_observers(chain, what)


def set_ranges(chain: Chain, plan: BitPlan, recipe: Recipe, before: BitPlan | None = None) -> None:
    """Choose every scale and zero point for the planned bits; `observe` must have run.

    Args:
        chain: The prepared network.
        plan: Bits of every layer; operands of products that it does not name get the recipe's.
        recipe: Kinds of ranges.
        before: The plan that the ranges are set for now; weights whose bits stay are not searched again.

    Raises:
        UserError: A layer's weight holds NaN or infinity; the message names the layer.
    """
    symmetric = recipe.profile == "deploy"
    for path, layer in chain.layers.items():
        if not torch.isfinite(layer.weight).all():
            raise UserError(f"the weight of layer {path} holds NaN or infinity; allowed: finite weights")
        if before is None or before.weight[path] != plan.weight[path]:
            layer.weight_quantizer.set_range(layer.weight, replace(recipe.weight, bits=plan.weight[path]), symmetric)
        layer.integer_bias = recipe.profile == "deploy"
        layer.corrects_mean = recipe.bias_correction == "input_mean"
        layer.correction = layer.noise = None
    for name, quantizer in chain.quantizers.items():
        bits = plan.activation[name] if name in chain.layers else plan.activation.get(name, recipe.activation.bits)
        spec = None if bits is None else replace(recipe.activation, bits=bits)
        quantizer.set_range(spec, recipe.kind_of(quantizer.role), recipe.split_channels)
