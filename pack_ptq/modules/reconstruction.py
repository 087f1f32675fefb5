"""The reconstruction of one pack: rounding and scales are fitted to cached full-precision outputs (METHOD P3)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from pack_ptq.cache import Storage
from pack_ptq.distributed import all_reduce
from pack_ptq.graph.part import Part
from pack_ptq.graph.switch import switch
from pack_ptq.losses import reconstruction_loss
from pack_ptq.modules.easy_rows import EasyRows
from pack_ptq.quant.dropping import random_mask
from pack_ptq.quant.quantizers import WeightMode
from pack_ptq.quant.rounding import rounding_penalty, settled
from pack_ptq.schedules import cosine_to_zero, penalty_beta
from pack_ptq.types import ReconstructionSpec

EVALUATION_SAMPLES = 256


@dataclass(frozen=True)
class PackData:
    """What a pack is fitted to, row by row the same samples.

    Attributes:
        full_input: The pack's input in the full-precision network.
        quantized_input: The pack's input behind the quantized packs before it.
        target: The pack's output in the full-precision network.
        weight: Of every element's squared error, in the target's form; 1 if there is none.
    """

    full_input: Storage
    quantized_input: Storage
    target: Storage
    weight: Storage | None = None

    def rows(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Give the three tensors of some rows, and the weight if there is one."""
        rows = self.full_input.rows(index), self.quantized_input.rows(index), self.target.rows(index)
        return rows if self.weight is None else (*rows, self.weight.rows(index))

    def close(self) -> None:
        """Give the memory back."""
        for storage in (self.full_input, self.quantized_input, self.target, self.weight):
            if storage is not None:
                storage.close()


class RandomBatches(IterableDataset):
    """Whole batches of random rows, or of some of them, drawn from a generator of their own.

    Args:
        data: All rows.
        batch_size: Rows of a batch; fewer if there are fewer.
        steps: Number of batches.
        seed: Of the generator.
        among: Rows to draw from.
        easy: Chooses them anew for every batch instead.
    """

    def __init__(
        self,
        data: PackData,
        batch_size: int,
        steps: int,
        seed: int,
        among: Tensor | None = None,
        easy: EasyRows | None = None,
    ) -> None:
        super().__init__()
        self.easy = easy
        self.data, self.steps = data, steps
        self.among = torch.arange(len(data.target)) if among is None else among
        self.batch_size = min(batch_size, len(self.among))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for step in range(self.steps):
            among = self.among if self.easy is None else self.easy.at(step, self.batch_size)
            drawn = torch.randperm(len(among), generator=self.generator)[: self.batch_size]
            yield self.data.rows(among[drawn])


@torch.no_grad()
def output_error(run: Callable[[Tensor], Tensor], data: PackData) -> float:
    """Give the reconstruction loss of `run` on the first samples of the cache, averaged over processes."""
    count = min(EVALUATION_SAMPLES, len(data.target))
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, count, 64):
        _, quantized_input, target, *weight = data.rows(slice(start, min(start + 64, count)))
        loss = reconstruction_loss(run(quantized_input), target, *weight).item()
        sums += torch.tensor([loss * len(target), len(target)], dtype=torch.float64)
    total, samples = all_reduce(sums)
    return (total / samples).item()


@torch.no_grad()
def row_errors(run: Callable[[Tensor], Tensor], data: PackData) -> Tensor:
    """Give the reconstruction loss of `run` on each row of the cache, shape (rows,), on the CPU."""
    errors = []
    for start in range(0, len(data.target), 64):
        _, quantized_input, target, *weight = data.rows(slice(start, start + 64))
        square = (run(quantized_input) - target).square()
        square = square * weight[0] if weight else square
        errors.append(square.flatten(1).mean(1).cpu() * target.shape[1])
    return torch.cat(errors)


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
            layer.weight_quantizer.begin_fit(layer.compensated_weight, learn_scale=spec.weight_scale_lr > 0)
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
            (self.roundings, self.spec.rounding_lr, lambda step: 1.0),
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

    def corrections(self) -> list[Tensor | None]:
        """Give a copy of every layer's correction of its bias."""
        return [None if layer.correction is None else layer.correction.detach().clone() for layer in self.layers]

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


def loader(
    data: PackData,
    batch_size: int,
    steps: int,
    seed: int,
    among: Tensor | None = None,
    easy: EasyRows | None = None,
) -> DataLoader:
    """Give the random batches of a fit as Lightning takes them; for the arguments see `RandomBatches`."""
    return DataLoader(RandomBatches(data, batch_size, steps, seed, among, easy), batch_size=None)
