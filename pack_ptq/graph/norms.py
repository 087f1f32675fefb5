"""Scale re-parameterisation: a scale per channel after LayerNorm, without one at inference (RepQ-ViT, METHOD A1).

LayerNorm's outputs differ widely between channels, so one scale for all fits none. With a scale `s` and a zero point
`z` for every channel, `r1 = s / mean(s)` and `r2 = z - mean(z)`, the norm's parameters become `gamma / r1` and
`(beta + s r2) / r1`, and those of the layers that read it `W r1` and `b - W (s r2)`. The network stays the same
function, and one scale `mean(s)` with one zero point `mean(z)` then does what the many did (arXiv 2212.08254, eq. 7
to 11).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pack_ptq.graph.chain import Chain
from pack_ptq.graph.operations import PASSING
from pack_ptq.graph.trace import Trace
from pack_ptq.quant.channel_observer import ChannelObserver
from pack_ptq.quant.quantizers import ActivationQuantizer

TOLERANCE = 1e-3
MOVING = PASSING | {"pad"}
Factors = tuple[Tensor, Tensor]  # what the norm's outputs are divided by, and what is added to them before


@dataclass(frozen=True)
class NormSite:
    """A LayerNorm that only linear layers read.

    Attributes:
        path: Of the norm.
        layers: Paths of the layers.
    """

    path: str
    layers: tuple[str, ...]


def find_norms(chain: Chain, example: Tensor) -> list[NormSite]:
    """Find the norms whose outputs may be scaled and shifted by channel; each is tried out.

    Args:
        chain: The prepared network.
        example: Input samples, shape (batch, ...), on the network's device.
    """
    sites = []
    paths = [span.path for span in chain.trace.spans]
    for span in chain.trace.spans:
        norm = span.module
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) > 1 or norm.weight is None:
            continue
        layers = _readers(chain.trace, span.output) if paths.count(span.path) == 1 else None
        if layers and all(isinstance(chain.layers[path].layer, nn.Linear) for path in layers):
            sites.append(NormSite(span.path, tuple(layers)))
    return [site for site in sites if _stays_the_same(chain, site, example)]


def _readers(trace: Trace, value: int | None) -> list[str] | None:
    """Give the layers that read a value, also through calls that only move it; nothing if anything else does."""
    if value is None or value == trace.output:
        return None
    layers: list[str] = []
    for index in trace.consumers(value):
        call = trace.calls[index]
        if call.layer is not None:
            layers += [] if call.layer in layers else [call.layer]
        elif call.name in MOVING:
            further = _readers(trace, index)
            if further is None:
                return None
            layers += [path for path in further if path not in layers]
        else:
            return None
    return layers


@torch.no_grad()
def _stays_the_same(chain: Chain, site: NormSite, x: Tensor) -> bool:
    """Tell whether moving the channels of one norm leaves the network's output as it is; put all back."""
    norm: Any = chain.network.get_submodule(site.path)
    layers = [chain.layers[path] for path in site.layers]
    if any(layer.weight.shape[1] != norm.weight.numel() for layer in layers):
        return False
    expected = chain.network(x)
    modules: list[Any] = [norm, *(layer.layer for layer in layers)]
    before = [(p, p.data.clone()) for module in modules for p in module.parameters()]
    without = [module for module in modules if module.bias is None]
    channels = torch.arange(norm.weight.numel(), device=x.device)
    put_norm(chain, site, (1 + 0.5 * torch.cos(channels), torch.sin(channels)))
    output = chain.network(x)
    for parameter, data in before:
        parameter.data = data
    for module in without:
        module.bias = None
    return bool((output - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1))


@torch.no_grad()
def put_norm(chain: Chain, site: NormSite, factors: Factors) -> None:
    """Scale and shift the channels after one norm, and undo it in the layers that read it.

    Args:
        chain: The prepared network.
        site: The norm.
        factors: What its outputs are divided by after something was added to them, each of shape (channels,).
    """
    norm: Any = chain.network.get_submodule(site.path)
    divisor, shift = (factor.to(norm.weight.device).double() for factor in factors)
    _add_to_bias(norm, shift)
    for parameter in (norm.weight, norm.bias):
        parameter.copy_(parameter.double() / divisor)
    for path in site.layers:
        layer: Any = chain.layers[path].layer
        _add_to_bias(layer, -(layer.weight.double() @ shift))
        layer.weight.mul_(divisor)
        mean = chain.layers[path].input_mean
        if mean is not None:
            mean.copy_((mean.double() + shift) / divisor)


def _add_to_bias(module: Any, added: Tensor) -> None:
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(added, dtype=module.weight.dtype), requires_grad=False)
    module.bias.copy_(module.bias.double() + added)


def watch_norms(chain: Chain, sites: Sequence[NormSite]) -> None:
    """Let the passes over the calibration samples see every channel after the norms."""
    for site in sites:
        for quantizer in _quantizers(chain, site):
            quantizer.channels = ChannelObserver()


def _quantizers(chain: Chain, site: NormSite) -> list[ActivationQuantizer]:
    """Give those of the layers that read a norm, each once: layers that read all of it share one."""
    return list(dict.fromkeys(chain.layers[path].input_quantizer for path in site.layers))


def reparameterise(chain: Chain, sites: Sequence[NormSite], bits: int) -> dict[str, Any]:
    """Make the channels after the norms alike, and the observers of their quantizers with them.

    Args:
        chain: The prepared network, observed since `watch_norms`.
        sites: The norms.
        bits: Of activations, for which every channel's scale is searched.

    Returns:
        What `put_norms` takes to do the same again.
    """
    done = {}
    for site in sites:
        seen = {quantizer: quantizer.channels for quantizer in _quantizers(chain, site)}
        # Layers may read parts of what the norm gives, such as the class token alone; the largest tells most of it.
        channels = max((each for each in seen.values() if each is not None), key=lambda each: each.count)
        scale, zero_point = channels.affine(bits)
        empty = (channels.low == 0) & (channels.high == 0)
        if empty.any() and not empty.all():  # whose scale means nothing, and should not stand out
            scale[empty], zero_point[empty] = scale[~empty].mean(), zero_point[~empty].mean().round()
        divisor = scale / scale.mean()
        shift = scale * (zero_point - zero_point.mean().round())
        put_norm(chain, site, (divisor, shift))
        for quantizer, own in seen.items():
            assert own is not None
            quantizer.observer.replace((own.centers() + shift[:, None]) / divisor[:, None], own.histogram)
            quantizer.channels = None
        done[site.path] = {"layers": list(site.layers), "divisor": divisor.cpu(), "shift": shift.cpu()}
    return done


def put_norms(chain: Chain, done: Mapping[str, Any]) -> None:
    """Move the channels of a freshly prepared network as `reparameterise` did."""
    for path, values in done.items():
        put_norm(chain, NormSite(path, tuple(values["layers"])), (values["divisor"], values["shift"]))
