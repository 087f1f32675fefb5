"""A convolution or linear layer that computes with a quantized weight, input and bias."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import handle_torch_function, has_torch_function_unary

from pack_ptq.quant.input_mean import InputMean, mean_output
from pack_ptq.quant.quantizers import ActivationQuantizer, WeightQuantizer

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)


def run_quantized(x: Tensor, layer: "QuantizedLayer") -> Tensor:
    """Run a quantized layer; a public function, so that a `TorchFunctionMode` sees the layer as one operation."""
    if has_torch_function_unary(x):
        return handle_torch_function(run_quantized, (x,), x, layer)
    output = layer.compute(x)
    if layer.counting is not None:
        layer.count(x, output, layer.counting)
    return output


class QuantizedLayer(nn.Module):
    """A layer of `QUANTIZABLE` with a quantizer for its weight and one for its input.

    With both quantizers off it computes exactly what the wrapped layer computes.

    Args:
        layer: The full-precision layer; its weight stays in place.
        input_quantizer: May be shared with other layers that read the same tensor.

    Attributes:
        compensation: Added to the weight before it is quantized, if anything; the full-precision layer lacks it.
        start: Where roundings of the weight begin: its nearest codes stand for those of the weight. If not given, the
            compensated weight.
        trial: Weight to compute with as it is, while one is looked for.
        inputs: Takes what the layer reads at every call, if it is to be kept.
        correction: Added to the bias where the weight is quantized, if anything, shape (output channels,).
        noise: Added to the input before it is quantized, if anything, and taken out again by the bias (NoisyQuant,
            arXiv 2211.16056), shape (input channels,); of linear layers only.
        seen: Takes what the layer reads in the first pass of the calibration.
        input_mean: What it reads on average in full precision, once observed, shape (input channels,).
        corrects_mean: Whether the bias takes up what weights that are quantized, but not held as hard codes yet, add on
            average; with hard codes that is in `correction`.
        integer_bias: Round the bias to multiples of (input scale x weight scale), as int32 runtimes do (DEPLOY.md).
        counting: Samples of a batch whose elements and multiplications are to be noted, if any.
        input_elements: Of all calls for one sample.
        macs: The same for multiplications.
    """

    compensation: Tensor | None
    start: Tensor | None
    noise: Tensor | None
    input_mean: Tensor | None

    def __init__(self, layer: nn.Module, input_quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = WeightQuantizer(channel_axis=1 if isinstance(layer, TRANSPOSED) else 0)
        self.input_quantizer = input_quantizer
        self.register_buffer("compensation", None, persistent=False)
        self.register_buffer("start", None, persistent=False)
        self.register_buffer("noise", None, persistent=False)
        self.register_buffer("input_mean", None, persistent=False)
        self.seen = InputMean(layer)
        self.corrects_mean = False
        self.trial: Tensor | None = None
        self.inputs: list[Tensor] | None = None
        self.correction: nn.Parameter | None = None
        self.integer_bias = False
        self.counting: int | None = None
        self.input_elements = self.macs = 0

    def __getattr__(self, name: str) -> Any:
        """Give what the wrapped layer has, since networks ask layers for their kernel size and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)

    @property
    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """The quantizer of its one operand, as a `QuantizedProduct` has several; its name is empty."""
        return {"": self.input_quantizer}

    @property
    def weight(self) -> Tensor:
        """The full-precision weight."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def compensated_weight(self) -> Tensor:
        """The weight that the codes are to stand for."""
        return self.weight if self.compensation is None else self.weight + self.compensation

    @property
    def rounded_weight(self) -> Tensor:
        """What is rounded to codes."""
        return self.compensated_weight if self.start is None else self.start

    @property
    def bias(self) -> Tensor | None:
        """The full-precision bias."""
        return self.layer.bias  # type: ignore[return-value]

    def count(self, x: Tensor, output: Tensor, samples: int) -> None:
        """Add what one call reads and multiplies."""
        # Each output element of a convolution is a sum over one filter; in a transposed one, each input element is
        # spread by one.
        elements = (x if isinstance(self.layer, TRANSPOSED) else output).numel() // samples
        self.input_elements += x.numel() // samples
        self.macs += elements * (self.weight.numel() // max(1, self.weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer on `x`, in the shapes of the wrapped layer."""
        return run_quantized(x, self)

    def compute(self, x: Tensor) -> Tensor:
        """Quantize the input, the weight and the bias as set, and call the wrapped layer with them."""
        if self.inputs is not None:
            self.inputs.append(x.clone())  # the network may change it in place behind the layer
        if self.input_quantizer.watching == "extremes":
            self.seen.see(x)
        noise = self.noise if self.input_quantizer.is_quantizing else None
        x = self.input_quantizer(x if noise is None else x + noise)
        is_quantized = self.trial is None and self.weight_quantizer.mode != "off"
        if self.trial is None and not is_quantized and noise is None:
            return self.layer(x)
        parameters = {"weight": self.weight if self.trial is None else self.trial}
        bias = self.bias
        if is_quantized:
            parameters["weight"] = weight = self.weight_quantizer(self.rounded_weight)
            bias = self.corrected_bias(weight)
        if noise is not None:
            added = parameters["weight"] @ noise
            bias = -added if bias is None else bias - added
        if bias is not None:
            is_rounded = is_quantized and self.integer_bias and self.input_quantizer.is_quantizing
            parameters["bias"] = self.rounded_bias(bias) if is_rounded else bias
        return functional_call(self.layer, parameters, (x,))

    def corrected_bias(self, weight: Tensor) -> Tensor | None:
        """Give the bias to compute with beside a quantized weight, before it is rounded."""
        correction = self.correction if self.weight_quantizer.mode == "hard" else self.whole_correction(weight)
        return self.bias if self.bias is None or correction is None else self.bias + correction

    def whole_correction(self, weight: Tensor) -> Tensor | None:
        """Give `correction` and, if wanted, what the output lacks on average with a weight; nothing if neither.

        It has a gradient for the weight.
        """
        if not self.corrects_mean or self.input_mean is None or self.bias is None or isinstance(self.layer, TRANSPOSED):
            return self.correction
        lacking = mean_output(self.layer, self.compensated_weight - weight, self.input_mean)
        return lacking if self.correction is None else self.correction + lacking

    def rounded_bias(self, bias: Tensor) -> Tensor:
        """Give a bias as int32 multiples of `s_x s_w`; transposed grouped layers keep theirs, for scales repeat."""
        step = (self.weight_quantizer.learned_scale() * self.input_quantizer.scale).reshape(-1).detach()
        if step.numel() not in (1, bias.numel()):
            step = step.repeat(bias.numel() // step.numel())
        rounded = torch.round(bias.detach() / step).clamp(-(2**31), 2**31 - 1) * step
        return rounded + (bias - bias.detach())  # for tuning, a bias passes its gradient on as if it were not rounded
