"""A convolution or linear layer that computes with a quantized weight, input and bias."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import handle_torch_function, has_torch_function_unary

from pack_ptq.quant.quantizers import ActivationQuantizer, WeightQuantizer

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)


def run_quantized(x: Tensor, layer: "QuantizedLayer") -> Tensor:
    """Run a quantized layer; a public function, so that a `TorchFunctionMode` sees the layer as one operation."""
    if has_torch_function_unary(x):
        return handle_torch_function(run_quantized, (x,), x, layer)
    return layer.compute(x)


class QuantizedLayer(nn.Module):
    """A layer of `QUANTIZABLE` with a quantizer for its weight and one for its input.

    With both quantizers off it computes exactly what the wrapped layer computes.

    Args:
        layer: The full-precision layer; its weight stays in place.
        input_quantizer: May be shared with other layers that read the same tensor.

    Attributes:
        integer_bias: Round the bias to multiples of (input scale x weight scale), as int32 runtimes do (DEPLOY.md).
    """

    def __init__(self, layer: nn.Module, input_quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = WeightQuantizer(channel_axis=1 if isinstance(layer, TRANSPOSED) else 0)
        self.input_quantizer = input_quantizer
        self.integer_bias = False
        self.input_elements = self.macs = 0  # of one sample

    @property
    def weight(self) -> Tensor:
        """The full-precision weight."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The full-precision bias."""
        return self.layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer on `x`, in the shapes of the wrapped layer."""
        return run_quantized(x, self)

    def compute(self, x: Tensor) -> Tensor:
        """Quantize the input, the weight and the bias as set, and call the wrapped layer with them."""
        x = self.input_quantizer(x)
        if self.weight_quantizer.mode == "off":
            return self.layer(x)
        parameters = {"weight": self.weight_quantizer(self.weight)}
        if self.bias is not None and self._rounds_bias:
            parameters["bias"] = self.rounded_bias()
        return functional_call(self.layer, parameters, (x,))

    @property
    def _rounds_bias(self) -> bool:
        return self.integer_bias and self.input_quantizer.enabled and self.input_quantizer.bits is not None

    def rounded_bias(self) -> Tensor:
        """Give the bias as int32 multiples of `s_x s_w`; transposed grouped layers keep theirs, for scales repeat."""
        bias = self.bias
        assert bias is not None
        step = (self.weight_quantizer.learned_scale() * self.input_quantizer.scale).reshape(-1).detach()
        if step.numel() not in (1, bias.numel()):
            step = step.repeat(bias.numel() // step.numel())
        rounded = torch.round(bias.detach() / step).clamp(-(2**31), 2**31 - 1) * step
        return rounded + (bias - bias.detach())  # for tuning, a bias passes its gradient on as if it were not rounded
