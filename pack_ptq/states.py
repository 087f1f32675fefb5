"""What run folders keep of a network: ranges, hard codes, and the rest in full precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pack_ptq.graph.chain import Chain
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.products import QuantizedProduct, operand_quantizers
from pack_ptq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from pack_ptq.types import TuningResult, Unit, UnitResult


def quantizer_state(quantizer: ActivationQuantizer) -> dict[str, Any]:
    """Give what an activation's codes are."""
    return {
        "scale": quantizer.scale.data,
        "lower": quantizer.lower.data,
        "zero_point": quantizer.zero_point,
        "bits": quantizer.bits,
        "kind": quantizer.kind,
        "copies": quantizer.copies,
    }


def put_quantizer_state(quantizer: ActivationQuantizer, values: dict[str, Any]) -> None:
    """Put back what `quantizer_state` gave."""
    quantizer.bits, quantizer.kind = values["bits"], values["kind"]
    quantizer.zero_point = values["zero_point"].to(quantizer.scale.device)
    quantizer.copies = None if values["copies"] is None else values["copies"].to(quantizer.scale.device)
    quantizer.put_learned(values)


def layer_state(layer: QuantizedLayer) -> dict[str, Any]:
    """Give scales and zero points of a layer, and its codes (uint8 or int8) if it has hard ones."""
    weight = layer.weight_quantizer
    return {
        "codes": weight.codes,
        "scale": weight.scale,
        "zero_point": weight.zero_point,
        "bits": weight.bits,
        "signed": weight.signed,
        "input": quantizer_state(layer.input_quantizer),
        "correction": None if layer.correction is None else layer.correction.detach(),
        "noise": layer.noise,
        "input_mean": layer.input_mean if layer.corrects_mean else None,
        "integer_bias": layer.integer_bias,
    }


def put_layer_state(layer: QuantizedLayer, values: dict[str, Any]) -> None:
    """Put back what `layer_state` gave; with codes the weight's mode is then `hard`."""
    weight, device = layer.weight_quantizer, layer.weight.device
    weight.bits, weight.signed = values["bits"], values["signed"]
    weight.scale, weight.zero_point = values["scale"].to(device), values["zero_point"].to(device)
    if values["codes"] is not None:
        weight.set_codes(values["codes"].to(device), weight.scale)
    put_quantizer_state(layer.input_quantizer, values["input"])
    layer.integer_bias = values["integer_bias"]
    noise, mean = values.get("noise"), values.get("input_mean")  # older runs have neither
    correction = values["correction"]
    layer.noise = None if noise is None else noise.to(device)
    layer.input_mean, layer.corrects_mean = None if mean is None else mean.to(device), mean is not None
    layer.correction = None if correction is None else nn.Parameter(correction.to(device), requires_grad=False)


def operations_state(layers: Mapping[str, QuantizedLayer], products: Mapping[str, QuantizedProduct]) -> dict[str, Any]:
    """Give the state of layers and of the operands of products, by path."""
    operands = operand_quantizers(products).items()
    return {
        "layers": {path: layer_state(layer) for path, layer in layers.items()},
        "operands": {name: quantizer_state(quantizer) for name, quantizer in operands},
    }


def ranges_state(chain: Chain) -> dict[str, Any]:
    """Give the state of all layers and products."""
    return operations_state(chain.layers, chain.products)


def put_ranges_state(chain: Chain, state: dict[str, Any]) -> None:
    """Put back what `operations_state` gave for some or all of the operations."""
    for path, values in state["layers"].items():
        put_layer_state(chain.layers[path], values)
    quantizers = chain.quantizers
    for name, values in state["operands"].items():
        put_quantizer_state(quantizers[name], values)


def unit_state(chain: Chain, unit: Unit, result: UnitResult) -> dict[str, Any]:
    """Give what a pack file holds: the state of every layer and product, and how the fit went."""
    state = operations_state(chain.layers_of(unit.start, unit.stop), chain.products_of(unit.start, unit.stop))
    return {**state, "result": result.to_json() | {"blocks": list(result.blocks)}}


def put_unit_state(chain: Chain, state: dict[str, Any]) -> UnitResult:
    """Put the codes and scales of a pack file in place."""
    put_ranges_state(chain, state)
    return UnitResult.from_json(state["result"] | {"blocks": tuple(state["result"]["blocks"])})


def tuned_state(chain: Chain, result: TuningResult) -> dict[str, Any]:
    """Give what the last pass over the network leaves: the state and the bias of every layer, and how it went."""
    biases = {path: layer.bias.detach() for path, layer in chain.layers.items() if layer.bias is not None}
    return {**ranges_state(chain), "biases": biases, "result": result.to_json()}


@torch.no_grad()
def put_tuned_state(chain: Chain, state: dict[str, Any]) -> TuningResult:
    """Put back what `tuned_state` gave."""
    put_ranges_state(chain, state)
    for path, bias in state["biases"].items():
        chain.layers[path].bias.copy_(bias)  # type: ignore[union-attr]
    return TuningResult.from_json(state["result"])


def rest_state(chain: Chain) -> dict[str, Tensor]:
    """Give every parameter and buffer outside the quantized layers, the layers' biases, and weights read elsewhere."""
    modules = list(chain.network.named_modules(remove_duplicate=False))
    quantizers = tuple(f"{path}." for path, m in modules if isinstance(m, ActivationQuantizer | WeightQuantizer))
    own = {f"{path}.layer.weight" for path, m in modules if isinstance(m, QuantizedLayer)} - chain.trace.parameters
    kept = chain.network.state_dict()
    return {k: v for k, v in kept.items() if k not in own and not k.startswith(quantizers)}


def put_rest_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `rest_state` gave."""
    network.load_state_dict(state, strict=False)
