"""What run folders keep of a network: ranges, hard codes, and the rest in full precision."""

from typing import Any

import torch
from torch import Tensor, nn

from pack_ptq.graph.chain import Chain
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.types import TuningResult, Unit, UnitResult


def layer_state(layer: QuantizedLayer) -> dict[str, Any]:
    """Give scales and zero points of a layer, and its codes (uint8 or int8) if it has hard ones."""
    weight, source = layer.weight_quantizer, layer.input_quantizer
    return {
        "codes": weight.codes,
        "scale": weight.scale,
        "zero_point": weight.zero_point,
        "bits": weight.bits,
        "signed": weight.signed,
        "input_scale": source.scale.data,
        "input_zero_point": source.zero_point,
        "input_bits": source.bits,
        "integer_bias": layer.integer_bias,
    }


def put_layer_state(layer: QuantizedLayer, values: dict[str, Any]) -> None:
    """Put back what `layer_state` gave; with codes the weight's mode is then `hard`."""
    weight, source, device = layer.weight_quantizer, layer.input_quantizer, layer.weight.device
    weight.bits, weight.signed = values["bits"], values["signed"]
    weight.scale, weight.zero_point = values["scale"].to(device), values["zero_point"].to(device)
    if values["codes"] is not None:
        weight.set_codes(values["codes"].to(device), weight.scale)
    source.bits = values["input_bits"]
    source.scale.data, source.zero_point = values["input_scale"].to(device), values["input_zero_point"].to(device)
    layer.integer_bias = values["integer_bias"]


def ranges_state(chain: Chain) -> dict[str, Any]:
    """Give the state of all layers."""
    return {path: layer_state(layer) for path, layer in chain.layers.items()}


def put_ranges_state(chain: Chain, state: dict[str, Any]) -> None:
    """Put back what `ranges_state` gave."""
    for path, values in state.items():
        put_layer_state(chain.layers[path], values)


def unit_state(chain: Chain, unit: Unit, result: UnitResult) -> dict[str, Any]:
    """Give what a pack file holds: the state of every layer, and how the fit went."""
    layers = {path: layer_state(layer) for path, layer in chain.layers_of(unit.start, unit.stop).items()}
    return {"layers": layers, "result": result.to_json() | {"blocks": list(result.blocks)}}


def put_unit_state(chain: Chain, state: dict[str, Any]) -> UnitResult:
    """Put the codes and scales of a pack file in place."""
    put_ranges_state(chain, state["layers"])
    return UnitResult.from_json(state["result"] | {"blocks": tuple(state["result"]["blocks"])})


def tuned_state(chain: Chain, result: TuningResult) -> dict[str, Any]:
    """Give what the last pass over the network leaves: the state and the bias of every layer, and how it went."""
    biases = {path: layer.bias.detach() for path, layer in chain.layers.items() if layer.bias is not None}
    return {"layers": ranges_state(chain), "biases": biases, "result": result.to_json()}


@torch.no_grad()
def put_tuned_state(chain: Chain, state: dict[str, Any]) -> TuningResult:
    """Put back what `tuned_state` gave."""
    put_ranges_state(chain, state["layers"])
    for path, bias in state["biases"].items():
        chain.layers[path].bias.copy_(bias)  # type: ignore[union-attr]
    return TuningResult.from_json(state["result"])


def rest_state(chain: Chain) -> dict[str, Tensor]:
    """Give every parameter and buffer outside the quantized layers, and the layers' biases."""
    own = {f"{path}.layer.weight" for path in chain.layers}
    kept = chain.network.state_dict()
    return {k: v for k, v in kept.items() if k not in own and "_quantizer." not in k}


def put_rest_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `rest_state` gave."""
    network.load_state_dict(state, strict=False)
