"""A last pass over the whole network: scales and biases are fitted to its own full-precision outputs."""

from collections.abc import Iterable
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pack_ptq.cache import Storage
from pack_ptq.distributed import all_reduce
from pack_ptq.errors import refuse
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.losses import kl_from_full_precision
from pack_ptq.modules.pack_data import PackData
from pack_ptq.schedules import cosine_to_zero, rate_at_bits
from pack_ptq.types import Recipe, TuningSpec

Learned = tuple[list[tuple[Tensor, Tensor | None]], list[dict[str, Tensor]]]


@dataclass(frozen=True)
class NetworkData(PackData):
    """Inputs of the whole network, the same in both paths, and its full-precision outputs.

    Attributes:
        wanted: The outputs to fit to, if not the full-precision network's own.
        features: What the last link reads in the full-precision network, if a link lies before it.
    """

    wanted: Storage | None = None
    features: Storage | None = None

    @property
    def reference(self) -> Storage:
        """What the steps fit to and held-out rows are judged by."""
        return self.target if self.wanted is None else self.wanted

    def rows(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Give the inputs of some rows twice, without a second copy, what to fit to, and their features if cached."""
        x = self.full_input.rows(index)
        found = x, x, self.reference.rows(index)
        return found if self.features is None else (*found, self.features.rows(index))


def averaged_over_views(outputs: Tensor, views: int) -> Tensor:
    """Give every view of a sample the mean of the class probabilities of all its views.

    The mean is right more often than the single outputs, and says less of what is particular to a view.

    Args:
        outputs: Logits of all views, view after view, shape (views x samples, classes).
        views: Of each sample.

    Returns:
        Logarithms of the mean probabilities, the same shape.
    """
    mean = outputs.double().softmax(1).unflatten(0, (views, -1)).mean(0)
    return mean.clamp(min=torch.finfo(torch.float64).tiny).log().repeat(views, 1).to(outputs)


def check_tuning(chain: Chain, recipe: Recipe, samples: int) -> None:
    """Refuse a recipe that tunes what the network or the data does not have, before any work starts.

    Args:
        chain: The prepared network.
        recipe: Settings.
        samples: Calibration samples of the process that has the fewest.

    Raises:
        UserError: Only biases are to be tuned, and no layer has one; or no sample is left beside one held out.
    """
    spec = recipe.tuning
    if recipe.tuning_steps and samples < 2:
        allowed = "0 with fewer than 2 calibration samples a process, for one is held out"
        raise refuse("recipe.tuning.steps", recipe.tuning_steps, allowed)
    scales = spec.weight_scale_lr > 0 or spec.activation_scale_lr > 0
    if recipe.tuning_steps and not scales and all(layer.bias is None for layer in chain.layers.values()):
        allowed = "weight_scale_lr or activation_scale_lr above 0 beside it, for no quantized layer has a bias"
        raise refuse("recipe.tuning.bias_lr", spec.bias_lr, allowed)


class NetworkTuning(L.LightningModule):
    """Fits weight scales, activation scales and biases of all layers; the hard codes stay as they are.

    Units were fitted one after the other to their own outputs; this pass weighs their errors by what they do to the
    network's output. The loss is `KL(p_fp || p_q) + w ||f_q - f||^2 / ||f||^2`, `f` the features that the last link
    reads and `w` the recipe's `feature_weight`: a few hundred samples overfit their logits alone sooner. It has few
    variables (per channel, not per weight) for the same reason, and `p_fp` may be the mean over the views of a sample
    (`averaged_over_views`).

    Args:
        chain: The network with hard codes.
        spec: Settings.
        steps: Number of optimisation steps, which the schedule spans.
        bits: The recipe's bits of weights, by which the rates of weight scales and biases fall.
        rate_share: Factor of all rates, which `limit_rates` may lower.
        earlier_steps: Of passes before this one, behind which it is shown in TensorBoard.
    """

    def __init__(
        self,
        chain: Chain,
        spec: TuningSpec,
        steps: int,
        bits: int = 3,
        rate_share: float = 1.0,
        earlier_steps: int = 0,
    ) -> None:
        super().__init__()
        self.chain, self.spec, self.steps, self.bits = chain, spec, steps, bits
        self.rate_share, self.earlier_steps = rate_share, earlier_steps
        self.layers = list(chain.layers.values())
        self.quantizers = list(dict.fromkeys(chain.quantizers.values()))
        self.borrowed = nn.ModuleList(chain.operations)  # by which Lightning and DDP see the variables
        for layer in self.layers:
            layer.weight_quantizer.begin_tuning(spec.weight_scale_lr > 0)
            if layer.bias is not None:
                layer.bias.requires_grad_(spec.bias_lr > 0)
        for quantizer in self.quantizers:
            quantizer.learn(spec.activation_scale_lr > 0)
        switch(chain.operations, "hard", activations=True)

    def train(self, mode: bool = True) -> "NetworkTuning":
        """Stay in evaluation mode: norms that could not be folded must not move."""
        return super().train(False)

    def limit_rates(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Lower all rates by one factor until the first step promises no more than `first_drop` of the loss.

        Adam's first step moves every variable by its rate against the sign of its gradient, so that in first order the
        loss falls by `sum rate |gradient|`. Not below 0, though: what promises more goes too far (as in Polyak's step
        length, `loss / |gradient|^2` for steps along the gradient).

        Args:
            batches: Of the first steps, over which losses and promises are summed.
        """
        if self.spec.first_drop is None:
            return
        variables, rates = zip(*self._rates(), strict=True)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            loss = self.training_step(batch, 0)["loss"]
            gradients = torch.autograd.grad(loss, variables, allow_unused=True)
            falls = [rate * g.abs().sum().item() for rate, g in zip(rates, gradients, strict=True) if g is not None]
            sums += torch.tensor([loss.item(), sum(falls)], dtype=torch.float64)
        loss, promised = (all_reduce(sums) * torch.tensor([1, self.rate_share])).tolist()
        limit = self.spec.first_drop * loss
        if promised > limit:
            self.rate_share *= limit / promised

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One Adam whose rates are relative to the size of each variable and fall as a cosine."""
        groups = [{"params": [variable], "lr": self.rate_share * rate} for variable, rate in self._rates()]
        optimizer = torch.optim.Adam(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_to_zero(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rates(self) -> list[tuple[Tensor, float]]:
        """Give what is fitted, each variable once, and its first rate before `limit_rates`."""
        groups: dict[int, tuple[Tensor, float]] = {}
        factor = rate_at_bits(self.bits, self.spec.rate_power)
        for layer in self.layers:
            if layer.weight_quantizer.log_factor is not None:
                groups[id(layer.weight_quantizer)] = (
                    layer.weight_quantizer.log_factor,
                    factor * self.spec.weight_scale_lr,
                )
            if layer.bias is not None and layer.bias.requires_grad:
                size = layer.bias.detach().square().mean().sqrt().item()
                groups[id(layer.bias)] = (layer.bias, factor * self.spec.bias_lr * size)
        for quantizer in self.quantizers:
            rate = self.spec.activation_scale_lr * quantizer.scale.item()
            groups |= {id(variable): (variable, rate) for variable in quantizer.variables}
        return list(groups.values())

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> dict[str, Tensor]:
        """Give the loss, and as a part of it the divergence from the outputs that are fitted to."""
        _, x, reference, *features = batch
        end = len(self.chain)
        found = self.chain.run_collecting(x, 0, end, {end - 1} if features else ())
        divergence = kl_from_full_precision(found[end], reference).mean()
        loss = divergence
        if features:
            error = (found[end - 1] - features[0]).square().mean()
            loss = loss + self.spec.feature_weight * error / features[0].square().mean()
        return {"loss": loss, "divergence": divergence.detach()}

    @torch.no_grad()
    def divergences(self, data: NetworkData, rows: Tensor) -> Tensor:
        """Give `KL(p_fp || p_q)` on some rows, in nats, shape (rows,), float64 on the CPU."""
        found = []
        for part in rows.split(64):
            x, reference = data.full_input.rows(part), data.reference.rows(part)
            found.append(kl_from_full_precision(self.chain.network(x).double(), reference.double()).cpu())
        return torch.cat(found)

    def learned(self) -> Learned:
        """Give weight scale and bias of every layer, and what is learned of activations, as they are now."""
        weights = [
            (
                layer.weight_quantizer.learned_scale().detach().clone(),
                None if layer.bias is None else layer.bias.detach().clone(),
            )
            for layer in self.layers
        ]
        return weights, [quantizer.learned() for quantizer in self.quantizers]

    def end(self, kept: Learned) -> None:
        """Keep a copy of one of the iterates that `learned` gave, as plain numbers."""
        weights, activations = kept
        for layer, (scale, bias) in zip(self.layers, weights, strict=True):
            device = layer.weight.device
            layer.weight_quantizer.end_tuning(scale.to(device))
            if layer.bias is not None and bias is not None:
                layer.bias.data = bias.to(device, copy=True)
                layer.bias.requires_grad_(False)
        for quantizer, values in zip(self.quantizers, activations, strict=True):
            quantizer.put_learned(values)
            quantizer.learn(False)
