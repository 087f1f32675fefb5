"""Choose what to keep of the pass over the whole network, judged by held-out samples."""

import math
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from pack_ptq.distributed import all_reduce
from pack_ptq.modules.tuning import Learned, NetworkData, NetworkTuning
from pack_ptq.schedules import evaluation_steps


@dataclass(frozen=True)
class Iterate:
    """Where the pass over the whole network stood at some step.

    Attributes:
        divergences: From full precision on every held-out sample of this process.
        mean: Over the samples of all processes.
        learned: Scales and biases.
        rate_share: Of the pass it belongs to.
    """

    divergences: Tensor
    mean: float
    learned: Learned
    rate_share: float

    @classmethod
    def of(cls, module: NetworkTuning, data: NetworkData, held_out: Tensor) -> "Iterate":
        """Measure the network as it is now."""
        divergences = module.divergences(data, held_out)
        count, total = all_reduce(torch.stack([torch.ones_like(divergences), divergences], 1).sum(0))
        return cls(divergences, (total / count).item(), module.learned(), module.rate_share)

    def beats(self, other: "Iterate") -> bool:
        """Tell whether it is better by more than chance.

        That is by more than twice the standard error of the mean difference, or with less than half the divergence,
        for a single sample that is far off widens the error as it does the mean.
        """
        gain = other.divergences - self.divergences
        count, total, squares = all_reduce(torch.stack([torch.ones_like(gain), gain, gain.square()], 1).sum(0)).tolist()
        mean = total / count
        variance = max(0.0, squares / count - mean**2)
        beyond_chance = count > 1 and mean > 2 * math.sqrt(variance / (count - 1))
        return beyond_chance or 2 * self.mean < other.mean


class KeepBestTuning(L.Callback):
    """Measures the whole network on held-out samples in one or more passes and chooses the scales and biases to keep.

    These are the best after a first step, unless those before it beat them: a dozen held-out samples would undo by
    chance what helps on any others (docs/experiments.md).

    Args:
        data: Inputs and full-precision outputs.
        held_out: Rows of samples that the tuning does not see.
    """

    def __init__(self, data: NetworkData, held_out: Tensor) -> None:
        self.data, self.held_out = data, held_out
        self.iterates: list[Iterate] = []

    def begin(self, module: NetworkTuning) -> None:
        """Measure and hold what there is before the first step of all passes."""
        self.iterates = [Iterate.of(module, self.data, self.held_out)]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: NetworkTuning, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure if it is time to."""
        if batch_idx + 1 not in evaluation_steps(module.steps, module.spec.evaluations):
            return
        iterate = Iterate.of(module, self.data, self.held_out)
        if trainer.logger is not None:
            step = module.earlier_steps + batch_idx
            trainer.logger.log_metrics({"tuning/held_out_divergence": iterate.mean}, step=step)
        # A rate beyond reason may lead a scale to 0 or below, or the output to overflow.
        if math.isfinite(iterate.mean) and all(bool(quantizer.scale > 0) for quantizer in module.quantizers):
            self.iterates.append(iterate)

    @property
    def start(self) -> Iterate:
        """What there was before the first step."""
        return self.iterates[0]

    def chosen(self) -> Iterate:
        """Give what to keep, which may be the start."""
        start, *tuned = self.iterates
        best = min(tuned, key=lambda each: each.mean, default=start)
        return start if start.beats(best) else best
