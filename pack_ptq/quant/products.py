"""Products of two activations, as attention computes them, with a quantizer for each operand."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.quant.row_observer import RowObserver

Function = Callable[[dict[str, Any]], Tensor]


def run_product(product: "QuantizedProduct", function: Function, arguments: dict[str, Any]) -> Tensor:
    """Run a quantized product; a public function, so that a `TorchFunctionMode` sees it as one operation.

    Args:
        product: Holds the quantizers.
        function: Computes the product itself of its arguments.
        arguments: By name, the operands among them.
    """
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if has_torch_function(tensors):
        return handle_torch_function(run_product, tensors, product, function, arguments)
    if product.counting is None:
        return product.compute(function, arguments)
    with FlopCounterMode(display=False) as counter:
        output = product.compute(function, arguments)
    product.count(arguments, counter.get_total_flops() // 2, product.counting)
    return output


class QuantizedProduct(nn.Module):
    """One call of a product such as `torch.matmul`, whose operands are both quantized.

    With its quantizers off it is exactly that call.

    Args:
        operands: Names of the two arguments that are multiplied.
        constant: Names of those that do not depend on the network's input.

    Attributes:
        quantizers: By operand.
        counting: Samples of a batch whose elements and multiplications are to be noted, if any.
        input_elements: By operand, of one sample.
        macs: Of one sample.
    """

    def __init__(self, operands: tuple[str, ...], constant: Sequence[str] = ()) -> None:
        super().__init__()
        self.constant = frozenset(constant)
        self.quantizers: Mapping[str, ActivationQuantizer] = nn.ModuleDict(  # type: ignore[assignment]
            {name: ActivationQuantizer() for name in operands}
        )
        self.counting: int | None = None
        self.input_elements: dict[str, int] = dict.fromkeys(operands, 0)
        self.macs = 0

    def compute(self, function: Function, arguments: dict[str, Any]) -> Tensor:
        """Quantize the operands as set, and multiply."""
        operands = {name: quantizer(arguments[name]) for name, quantizer in self.quantizers.items()}
        return function({**arguments, **operands})

    def count(self, arguments: dict[str, Any], macs: int, samples: int) -> None:
        """Note the elements of the operands and the multiplications of one sample, of those of a batch."""
        self.macs = macs // samples
        self.input_elements = {
            name: arguments[name].numel() // (1 if name in self.constant else samples) for name in self.quantizers
        }


class QuantizedAttention(QuantizedProduct):
    """`scaled_dot_product_attention` with quantizers for query, key, the probabilities after softmax, and value."""

    def __init__(self) -> None:
        super().__init__(("query", "key", "probabilities", "value"))
        self.quantizers["probabilities"].role = "softmax"
        self.quantizers["probabilities"].rows = RowObserver(-1)

    def compute(self, function: Function, arguments: dict[str, Any]) -> Tensor:
        """Compute attention; in its two products, if any operand is to be quantized or looked at."""
        if not any(quantizer.is_active for quantizer in self.quantizers.values()):
            return function(arguments)
        probabilities = self.quantizers["probabilities"](self._probabilities(arguments))
        return probabilities @ self._repeated("value", arguments)

    def _repeated(self, name: str, arguments: dict[str, Any]) -> Tensor:
        """Give an operand quantized, and its heads repeated where several queries share one (grouped-query)."""
        x = self.quantizers[name](arguments[name])
        if not arguments.get("enable_gqa"):
            return x
        return x.repeat_interleave(arguments["query"].shape[-3] // x.shape[-3], -3)

    def _probabilities(self, arguments: dict[str, Any]) -> Tensor:
        query = self.quantizers["query"](arguments["query"])
        scale = arguments.get("scale")
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        # The scale comes after the product, so that the operands are what was observed.
        scores = (query @ self._repeated("key", arguments).mT) * scale
        if arguments.get("is_causal"):
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        mask = arguments.get("attn_mask")
        if mask is None:
            return F.softmax(scores, -1)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        # As torch does, a query that sees nothing gets nothing.
        return F.softmax(scores, -1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)

    def count(self, arguments: dict[str, Any], macs: int, samples: int) -> None:
        """Note the elements of the operands and the multiplications of one sample."""
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        scores = query.numel() // query.shape[-1] * key.shape[-2] // samples
        sizes = {name: arguments[name].numel() // samples for name in ("query", "key", "value")}
        self.input_elements = {name: sizes.get(name, scores) for name in self.quantizers}
        self.macs = scores * (query.shape[-1] + value.shape[-1])


def operand_quantizers(products: Mapping[str, QuantizedProduct]) -> dict[str, ActivationQuantizer]:
    """Give the quantizers of all operands by `path.operand`."""
    return {
        f"{path}.{operand}": quantizer
        for path, product in products.items()
        for operand, quantizer in product.quantizers.items()
    }
