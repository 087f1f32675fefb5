"""Low-rank candidates that compensate a linear layer's weight (AIQViT, METHOD A2)."""

import torch
from torch import Tensor, nn

from pack_ptq.quant.quantizers import WeightQuantizer


def ranks_below(shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Give the ranks that save something on a weight of shape (outputs, inputs); half of the full rank if none does."""
    smallest = min(shape)
    return tuple(rank for rank in ranks if rank < smallest) or (max(1, smallest // 2),)


def straight_through(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Give the weight rounded to nearest, with the gradient of the weight as it is inside the range of the codes.

    Outside there is none: a weight that moves away from its code's value changes nothing, and would go on for ever.
    """
    lowest, highest = ((limit - quantizer.zero_point) * quantizer.scale for limit in quantizer.limits)
    inside = weight.clamp(lowest, highest)
    mode, quantizer.mode = quantizer.mode, "nearest"
    rounded = quantizer(weight.detach())
    quantizer.mode = mode
    return inside + (rounded - inside.detach())


class LowRankCandidates(nn.Module):
    """The candidates `s B_j A_j` of one layer and the preference `alpha` between them.

    `s` is the root mean square of the weights and the entries of `A_j` begin at a variance of one over its rank, so
    that Adam's first step moves a weight by about its rate times `s`, whatever the rank. `B_j` begins at 0 (LoRA,
    arXiv 2106.09685), and with it the compensation.

    Args:
        weight: Of the layer, shape (outputs, inputs).
        ranks: Of the candidates, different ones.
        generator: Source of `A`, on the CPU.

    Attributes:
        up: Every `B_j`, side by side; outputs x sum of the ranks.
        down: Every `A_j`, one below the other; sum of the ranks x inputs.
        alpha: Of shape (candidates,); learned if there are several.
    """

    def __init__(self, weight: Tensor, ranks: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.ranks = ranks
        self.spread = weight.detach().square().mean().sqrt().item()
        down = torch.cat([torch.randn(rank, inputs, generator=generator) / rank**0.5 for rank in ranks])
        self.up = nn.Parameter(torch.zeros(outputs, sum(ranks)))
        self.down = nn.Parameter(down)
        self.alpha = nn.Parameter(torch.zeros(len(ranks)), requires_grad=len(ranks) > 1)

    def forward(self, kept: Tensor | None = None) -> Tensor:
        """Give `sum_j m_j softmax(alpha)_j s B_j A_j`, in the shape of the weight.

        The sum is linear, so the supernet `x^ W0 + sum_j phi(softmax(alpha)_j x^ B_j A_j)` is one layer with this added
        to its weight: one product of the size of the weight instead of two for each candidate and sample.

        Args:
            kept: `m`, what drop-path multiplies each candidate by, shape (candidates,); 1 if not given.
        """
        share = self.alpha.softmax(0) if kept is None else self.alpha.softmax(0) * kept.to(self.alpha)
        columns = share.repeat_interleave(torch.tensor(self.ranks, device=share.device), output_size=sum(self.ranks))
        return (self.spread * columns * self.up) @ self.down

    def draw_kept(self, drop_path: float, generator: torch.Generator) -> Tensor:
        """Draw what drop-path multiplies each candidate by: 0, or what keeps the mean; a single one always stays."""
        if len(self.ranks) == 1:
            return torch.ones(1)
        return (torch.rand(len(self.ranks), generator=generator) >= drop_path) / (1 - drop_path)

    @torch.no_grad()
    def choose(self) -> int:
        """Keep the candidate of the largest `alpha` alone, and give its rank."""
        best = int(self.alpha.argmax())
        start, rank = sum(self.ranks[:best]), self.ranks[best]
        self.ranks = (rank,)
        self.up = nn.Parameter(self.up[:, start : start + rank].clone())
        self.down = nn.Parameter(self.down[start : start + rank].clone())
        self.alpha = nn.Parameter(torch.zeros(1, device=self.alpha.device), requires_grad=False)
        return rank
