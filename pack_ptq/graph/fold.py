"""Fold BatchNorm into the convolution or linear layer before it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from pack_ptq.graph.plain import ends_in_product
from pack_ptq.graph.trace import ModuleSpan, Trace
from pack_ptq.quant.layers import QUANTIZABLE, TRANSPOSED


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is BatchNorm with running statistics, in any dimension, fused or frozen."""
    statistics = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    # A subclass with a forward of its own may do more than normalise; timm's keep that in `drop` and `act`.
    known = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or hasattr(module, "act")
    frozen = isinstance(module, FrozenBatchNorm2d) or "FrozenBatchNorm" in type(module).__name__
    return (frozen or (isinstance(module, _BatchNorm) and known)) and all(isinstance(s, Tensor) for s in statistics)


def fold_batch_norms(network: nn.Module, trace: Trace) -> list[str]:
    """Fold every BatchNorm whose input comes from one layer and is read by nothing else; in place.

    A fused BatchNorm-activation layer (timm) leaves its `drop` and `act` behind, a plain one `nn.Identity`.

    Args:
        network: In evaluation mode.
        trace: A recording of this network.

    Returns:
        Paths of the folded BatchNorms.
    """
    spans: dict[str, list[ModuleSpan]] = {}
    for span in trace.spans:
        spans.setdefault(span.path, []).append(span)
    once = {path: calls[0] for path, calls in spans.items() if len(calls) == 1}
    layers = [span for span in once.values() if isinstance(span.module, QUANTIZABLE)]
    makers = {span.output: span for span in layers if ends_in_product(span, trace)}
    folded = []
    for path, span in once.items():
        source = makers.get(span.input)
        if source is None or not is_batch_norm(span.module) or not _fits(source, span, trace):
            continue
        if any(not span.first <= reader <= span.last for reader in trace.consumers(span.input)):  # type: ignore[arg-type]
            continue
        _fold(source.module, span.module)
        _replace(network, span.module, _remains(span.module))
        folded.append(path)
    return folded


def _fits(source: ModuleSpan, norm: ModuleSpan, trace: Trace) -> bool:
    layer = source.module
    channels = layer.out_channels if hasattr(layer, "out_channels") else layer.out_features
    if channels != norm.module.running_mean.numel():  # type: ignore[operator, union-attr]
        return False
    # BatchNorm1d after a linear layer on (N, L, C) normalises L, not C.
    return not (isinstance(layer, nn.Linear) and len(trace.calls[source.output].output.dims) != 2)  # type: ignore[index]


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    gain = torch.rsqrt(norm.running_var.double() + getattr(norm, "eps", 1e-5))
    if getattr(norm, "weight", None) is not None:
        gain = gain * norm.weight
    shift = -norm.running_mean.double() * gain
    if getattr(norm, "bias", None) is not None:
        shift = shift + norm.bias
    weight = layer.weight
    if isinstance(layer, TRANSPOSED):
        grouped = weight.double().reshape(layer.groups, -1, *weight.shape[1:])
        gains = gain.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (grouped * gains).reshape(weight.shape)
    else:
        scaled = weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1))
    if layer.bias is not None:
        shift = shift + layer.bias.double() * gain
    layer.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def _remains(norm: nn.Module) -> nn.Module:
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    rest = [module for module in rest if not isinstance(module, nn.Identity)]
    return nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
