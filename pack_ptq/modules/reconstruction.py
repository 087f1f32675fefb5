"""The reconstruction of one pack: rounding and scales are fitted to cached full-precision outputs (METHOD P3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pack_ptq.graph.part import Part
from pack_ptq.graph.switch import switch
from pack_ptq.losses import reconstruction_loss
from pack_ptq.modules.output_error import output_error, row_errors
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.dropping import random_mask
from pack_ptq.quant.quantizers import WeightMode
from pack_ptq.quant.rounding import rounding_penalty, settled
from pack_ptq.schedules import cosine_to_zero, penalty_beta, rounding_rate
from pack_ptq.types import ReconstructionSpec


class PackReconstruction(L.LightningModule):
    """Fits the roundings and scales of one part of the network: a unit of the chain, or a single layer.

    It borrows the part's layers, whose ranges must be set, and leaves them in the mode `soft`.

    Args:
        part: What to fit; nothing outside it is run.
        spec: Settings of the fit.
        steps: Number of optimisation steps, which the schedules span.
        seed: Of the random choices of this part and process.
        errors: Root mean square of every layer's output error, by which rates of bias corrections go.
    """

    def __init__(
        self, part: Part, spec: ReconstructionSpec, steps: int, seed: int, errors: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.errors = errors
        self.part, self.spec, self.steps, self.seed = part, spec, steps, seed
        self.layers, self.quantizers = list(part.layers.values()), part.quantizers
        self.borrowed = nn.ModuleList(part.operations)  # by which Lightning and DDP see the variables
        self.label = part.label
        self.last_penalty = 0.0
        self._own: torch.Generator | None = None
        for layer in self.layers:
            layer.weight_quantizer.begin_fit(layer.rounded_weight, learn_scale=spec.weight_scale_lr > 0)
            if layer.correction is not None:
                layer.correction.requires_grad_(bool(spec.bias_lr))
        for quantizer in self.quantizers:
            quantizer.learn(spec.activation_scale_lr > 0)
        switch(part.operations, "soft", activations=True)

    def train(self, mode: bool = True) -> "PackReconstruction":
        """Stay in evaluation mode: the network is trained, and norms that could not be folded must not move."""
        return super().train(False)

    @property
    def roundings(self) -> list[Tensor]:
        """AdaRound's variables of every layer."""
        rounding = (layer.weight_quantizer.rounding for layer in self.layers)
        return [v for v in rounding if v is not None]

    @property
    def activation_scales(self) -> list[nn.Parameter]:
        """Scales of activations that are learned."""
        return [quantizer.scale for quantizer in self.quantizers if quantizer.scale.requires_grad]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One Adam with a group per kind of variable; the rates of scales fall as a cosine."""

        def cosine(step: int) -> float:
            return cosine_to_zero(step, self.steps)

        factors = [layer.weight_quantizer.log_factor for layer in self.layers]
        groups = [
            (self.roundings, rounding_rate(self.spec.rounding_lr, self.steps), lambda step: 1.0),
            ([f for f in factors if f is not None], self.spec.weight_scale_lr, cosine),
        ]
        # Scales differ by orders of magnitude (8 bits beside 3, small activations), so their rates are relative.
        for quantizer in self.quantizers:
            groups.append((quantizer.variables, self.spec.activation_scale_lr * quantizer.scale.item(), cosine))
        for layer, error in zip(self.layers, self.errors, strict=bool(self.errors)):
            if layer.correction is not None and self.spec.bias_lr:
                groups.append(([layer.correction], self.spec.bias_lr * error, cosine))
        groups = [group for group in groups if group[0]]
        optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate, _ in groups])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [factor for _, _, factor in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Let the quantizers draw QDrop's choices from this fit's generator."""
        self.begin(self.device)

    def begin(self, device: torch.device) -> None:
        """Seed the generator on the device and switch QDrop on."""
        self._own = torch.Generator(device).manual_seed(self.seed)
        self._set_drop(self.spec.inner_drop)

    def _set_drop(self, share: float) -> None:
        for quantizer in self.quantizers:
            quantizer.drop, quantizer.generator = share, self._own

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        """Give reconstruction loss plus rounding penalty, on an input that mixes both paths (QDrop)."""
        full_input, quantized_input, target, *weight = batch
        if self.spec.input_drop > 0 and not self.part.reads_image:
            from_full = random_mask(full_input, self.spec.input_drop, self._own)
            quantized_input = torch.lerp(quantized_input, full_input, from_full)
        loss = reconstruction_loss(self.part.run(quantized_input), target, *weight)
        beta = penalty_beta(index, self.steps, self.spec)
        if beta is None:
            return loss
        penalty = self.spec.penalty_weight * torch.stack([rounding_penalty(v, beta) for v in self.roundings]).sum()
        self.last_penalty = penalty.detach()  # type: ignore[assignment]
        return loss + penalty

    @contextmanager
    def _hard(self, weights: WeightMode) -> Iterator[None]:
        self._set_drop(0.0)
        switch(self.part.operations, weights, activations=True)
        yield
        switch(self.part.operations, "soft", activations=True)
        self._set_drop(self.spec.inner_drop)

    def hard_loss(self, data: PackData, weights: WeightMode = "settled") -> float:
        """Give the output error with hard codes; see `output_error`."""
        with self._hard(weights):
            return output_error(self.part.run, data)

    def hard_errors(self, data: PackData) -> Tensor:
        """Give the output error of every row with the codes that the fit has reached; see `row_errors`."""
        with self._hard("settled"):
            return row_errors(self.part.run, data)

    def settled_share(self) -> float:
        """Give the share of roundings within 0.05 of 0 or 1."""
        return sum(int(settled(v)) for v in self.roundings) / max(1, sum(v.numel() for v in self.roundings))

    def end(self) -> None:
        """Forget the variables of the fit."""
        self._set_drop(0.0)
        for layer in self.layers:
            layer.weight_quantizer.end_fit()
            if layer.correction is not None:
                layer.correction.requires_grad_(False)
        for quantizer in self.quantizers:
            quantizer.generator = None
            quantizer.learn(False)
