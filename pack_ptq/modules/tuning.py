"""A last pass over the whole network: scales and biases are fitted to its own full-precision outputs."""

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pack_ptq.distributed import all_reduce
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.losses import kl_from_full_precision
from pack_ptq.modules.reconstruction import EVALUATION_SAMPLES, PackData
from pack_ptq.schedules import cosine_to_zero
from pack_ptq.types import TuningSpec


class NetworkTuning(L.LightningModule):
    """Fits weight scales, activation scales and biases of all layers; the hard codes stay as they are.

    Units were fitted one after the other to their own outputs; this pass weighs their errors by what they do to the
    network's output, `KL(p_fp || p_q)`. It has few variables (per channel, not per weight), so that some hundred
    samples do not overfit it.

    Args:
        chain: The network with hard codes.
        spec: Settings.
        steps: Number of optimisation steps, which the schedule spans.
    """

    def __init__(self, chain: Chain, spec: TuningSpec, steps: int) -> None:
        super().__init__()
        self.chain, self.spec, self.steps = chain, spec, steps
        self.layers = list(chain.layers.values())
        self.borrowed = nn.ModuleList(self.layers)  # by which Lightning and DDP see the variables
        for layer in self.layers:
            layer.weight_quantizer.begin_tuning(spec.weight_scale_lr > 0)
            quantizer = layer.input_quantizer
            quantizer.scale.requires_grad_(spec.activation_scale_lr > 0 and quantizer.bits is not None)
            if layer.bias is not None:
                layer.bias.requires_grad_(spec.bias_lr > 0)
        switch(self.layers, "hard", activations=True)

    def train(self, mode: bool = True) -> "NetworkTuning":
        """Stay in evaluation mode: norms that could not be folded must not move."""
        return super().train(False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One Adam whose rates are relative to the size of each variable and fall as a cosine."""
        groups: dict[int, tuple[Tensor, float]] = {}
        for layer in self.layers:
            if layer.weight_quantizer.log_factor is not None:
                groups[id(layer.weight_quantizer)] = (layer.weight_quantizer.log_factor, self.spec.weight_scale_lr)
            scale = layer.input_quantizer.scale
            if scale.requires_grad:
                groups[id(scale)] = (scale, self.spec.activation_scale_lr * scale.item())
            if layer.bias is not None and layer.bias.requires_grad:
                size = layer.bias.detach().square().mean().sqrt().item()
                groups[id(layer.bias)] = (layer.bias, self.spec.bias_lr * size)
        optimizer = torch.optim.Adam([{"params": [variable], "lr": rate} for variable, rate in groups.values()])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_to_zero(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        """Give the divergence from the full-precision output."""
        _, x, reference = batch
        return kl_from_full_precision(self.chain.network(x), reference).mean()

    @torch.no_grad()
    def divergence(self, data: PackData) -> float:
        """Give `KL(p_fp || p_q)` on the first samples, in nats, averaged over samples and processes."""
        count = min(EVALUATION_SAMPLES, len(data.target))
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, count, 64):
            _, x, reference = data.rows(slice(start, min(start + 64, count)))
            divergence = kl_from_full_precision(self.chain.network(x).double(), reference.double())
            sums += torch.tensor([divergence.sum().item(), len(x)], dtype=torch.float64)
        total, samples = all_reduce(sums)
        return (total / samples).item()

    def end(self) -> None:
        """Keep what was learned as plain numbers."""
        for layer in self.layers:
            layer.weight_quantizer.end_tuning()
            layer.input_quantizer.scale.requires_grad_(False)
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
