"""What is fitted at once: a unit of the chain, or one of its layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.trace import Shape
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.products import QuantizedProduct
from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.types import Unit


@dataclass(frozen=True)
class Part:
    """Some quantized operations and the computation that they are fitted in.

    Attributes:
        label: Of its curves in TensorBoard.
        layers: By path.
        products: By path.
        run: Computes the part's output of its input.
        reads_image: Its input is the network's, which is never quantized before it.
    """

    label: str
    layers: dict[str, QuantizedLayer]
    products: dict[str, QuantizedProduct]
    run: Callable[[Tensor], Tensor]
    reads_image: bool = False

    @property
    def operations(self) -> list[QuantizedLayer | QuantizedProduct]:
        """All layers and products."""
        return [*self.layers.values(), *self.products.values()]

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        """Those of activations, each once."""
        return list(dict.fromkeys(q for operation in self.operations for q in operation.quantizers.values()))


def unit_part(chain: Chain, unit: Unit, label: str) -> Part:
    """Give a unit as a whole."""
    layers, products = chain.layers_of(unit.start, unit.stop), chain.products_of(unit.start, unit.stop)
    return Part(label, layers, products, lambda x: chain.run(x, unit.start, unit.stop), reads_image=unit.start == 0)


def layer_part(chain: Chain, unit: Unit, path: str, label: str) -> Part:
    """Give one layer of a unit; its label ends with its path inside the unit."""
    inside = path.removeprefix(f"{unit.name}.")
    layer = chain.layers[path]
    return Part(label if path == unit.name else f"{label}/{inside}", {path: layer}, {}, layer)


def layer_inputs(part: Part, x: Tensor) -> list[list[Tensor]]:
    """Run a part as it is set, and give what each layer reads at its calls, before it is quantized."""
    layers = list(part.layers.values())
    read: list[list[Tensor]] = [[] for _ in layers]
    for layer, inputs in zip(layers, read, strict=True):
        layer.inputs = inputs
    try:
        part.run(x)
    finally:
        for layer in layers:
            layer.inputs = None
    return read


def layer_rows(chain: Chain, paths: Sequence[str]) -> dict[str, int]:
    """Give how many rows of its input each layer reads per sample: 1, or more where windows lie along the first axis.

    Raises:
        UserError: A layer is called several times or reads no rows of samples, so it has no input of its own to be
            fitted on.
    """
    rows = {}
    for path in paths:
        calls = [call for call in chain.trace.calls if call.layer == path]
        two, three = calls[0].output.dims[0] if isinstance(calls[0].output, Shape) else (1, 1)
        if len(calls) > 1 or 3 * two != 2 * three:
            what = f"{path} is called {len(calls)} times" if len(calls) > 1 else f"{path} reads no rows of samples"
            raise UserError(f"recipe.reconstruction.granularity is 'layer', but {what}; allowed: pack")
        rows[path] = two // 2
    return rows
