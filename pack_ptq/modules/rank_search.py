"""The fit of low-rank compensations and the search for their ranks (AIQViT, METHOD A2)."""

from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from pack_ptq.graph.part import Part
from pack_ptq.graph.switch import switch
from pack_ptq.losses import reconstruction_loss
from pack_ptq.modules.random_batches import RandomBatches
from pack_ptq.quant.low_rank import LowRankCandidates, straight_through
from pack_ptq.schedules import cosine_to_zero
from pack_ptq.types import LowRankSpec


def split_rows(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give the rows for the candidates and those for the choice, drawn at random.

    They have none in common, unless there is only one.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(held_out * count)), max(1, count - 1))
    return order[held:] if count > 1 else order, order[:held]


class InTurns(IterableDataset):
    """Batches of two kinds, one after the other, beginning with the first kind.

    Args:
        first: At least half of `steps`, rounded up.
        second: At least half of `steps`, rounded down.
        steps: Batches in all.
    """

    def __init__(self, first: RandomBatches, second: RandomBatches, steps: int) -> None:
        super().__init__()
        self.first, self.second, self.steps = first, second, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        kinds = iter(self.first), iter(self.second)
        for step in range(self.steps):
            yield next(kinds[step % 2])


class RankSearch(L.LightningModule):
    """Fits the candidates of a part's linear layers to its full-precision output, behind quantized activations.

    While any layer has several candidates, every second step is one on `alpha` alone, first-order as in DARTS
    (arXiv 1806.09055), and its batches must be held out from the other steps; else all steps are on the candidates.

    Args:
        part: Its ranges must be set.
        candidates: By path of the layer; those of other paths are not compensated.
        spec: Settings.
        steps: Of this fit.
        seed: Of drop-path.
    """

    def __init__(
        self, part: Part, candidates: dict[str, LowRankCandidates], spec: LowRankSpec, steps: int, seed: int
    ) -> None:
        super().__init__()
        self.part, self.spec, self.steps = part, spec, steps
        self.label = f"{part.label}/low rank"
        self.borrowed = nn.ModuleList(part.operations)
        self.layers = [part.layers[path] for path in candidates]
        self.candidates = nn.ModuleList(candidates.values())
        self.is_search = any(each.alpha.requires_grad for each in candidates.values())
        self.generator = torch.Generator().manual_seed(seed)
        self.is_choosing = False
        switch(part.operations, "off" if spec.order == "before" else "nearest", activations=True)

    def train(self, mode: bool = True) -> "RankSearch":
        """Stay in evaluation mode, as `PackReconstruction` does."""
        return super().train(False)

    @property
    def factors(self) -> list[nn.Parameter]:
        """Every `A` and `B`."""
        return [factor for each in self.candidates for factor in (each.up, each.down)]  # type: ignore[misc]

    @property
    def alphas(self) -> list[nn.Parameter]:
        """Every `alpha` that is learned."""
        return [each.alpha for each in self.candidates if each.alpha.requires_grad]  # type: ignore[misc, union-attr]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One Adam with a group per kind of variable; the rate of the factors falls once the ranks are chosen.

        The rate of `alpha` rises linearly: Adam takes the first gradients, of candidates that have learned nothing yet,
        for as much as the later ones, and what `alpha` then leaves behind no longer learns.
        """
        groups = [{"params": self.factors, "lr": self.spec.learning_rate}]
        factors = [lambda step: 1.0 if self.is_search else cosine_to_zero(step, self.steps)]
        if self.is_search:
            groups.append({"params": self.alphas, "lr": self.spec.alpha_lr})
            factors.append(lambda step: min(1.0, step / self.steps))
        optimizer = torch.optim.Adam(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        """Give the reconstruction loss with the compensated weights; drop-path is off while the choice is judged."""
        _, quantized_input, target, *weight = batch
        self.is_choosing = self.is_search and index % 2 == 1
        for layer, each in zip(self.layers, self.candidates, strict=True):
            kept = None if self.is_choosing else each.draw_kept(self.spec.drop_path, self.generator)  # type: ignore[operator]
            merged = layer.weight + each(kept)
            layer.trial = straight_through(merged, layer.weight_quantizer) if self.spec.order == "joint" else merged
        loss = reconstruction_loss(self.part.run(quantized_input), target, *weight)
        for layer in self.layers:
            layer.trial = None
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the step move only what it is for; DDP wants a gradient for everything, so it is dropped here."""
        for parameter in self.factors if self.is_choosing else self.alphas:
            parameter.grad = None
