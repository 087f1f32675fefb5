"""Low-rank compensation of a part's linear layers before their weights are rounded (AIQViT, METHOD A2)."""

from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pack_ptq.graph.part import Part
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.random_batches import RandomBatches
from pack_ptq.modules.rank_search import InTurns, RankSearch, split_rows
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.low_rank import LowRankCandidates, ranks_below
from pack_ptq.trainers import make_trainer
from pack_ptq.types import LowRankSpec, QuantizerSpec, ReconstructionSpec
from pack_ptq.views import derived_seed
from pack_ptq.workplace import Workplace


def linear_layers(part: Part) -> dict[str, QuantizedLayer]:
    """Give the layers that can be compensated, by path."""
    return {path: layer for path, layer in part.layers.items() if isinstance(layer.layer, nn.Linear)}


def low_rank_candidates(part: Part, spec: LowRankSpec, generator: torch.Generator) -> dict[str, LowRankCandidates]:
    """Give each linear layer candidates of the ranks that are smaller than it, by path; the generator draws them."""
    return {
        path: LowRankCandidates(layer.weight, ranks_below(tuple(layer.weight.shape), spec.ranks), generator)
        for path, layer in linear_layers(part).items()
    }


def compensate(
    part: Part,
    data: PackData,
    spec: ReconstructionSpec,
    weight: QuantizerSpec,
    place: Workplace,
) -> dict[str, int]:
    """Search ranks, fit the compensations and leave them with the layers, their weights' ranges set anew.

    A step costs a plain one without soft rounding, and for each layer three products of the size of its weight with the
    sum of its ranks.

    Args:
        part: With linear layers; its ranges must be set. The layers' own weights stay.
        data: Cached activations.
        spec: Settings of the fit.
        weight: How ranges of weights are chosen; a layer's bits are its own.
        place: Where to run; its seed is of this part and process.

    Returns:
        The rank of each linear layer by its path.
    """
    low_rank, seed = spec.low_rank, place.seed
    generator = torch.Generator().manual_seed(derived_seed(seed, "low rank"))
    candidates = low_rank_candidates(part, low_rank, generator)

    def fit(steps: int, batches: IterableDataset, name: str) -> None:
        module = RankSearch(part, candidates, low_rank, steps, derived_seed(seed, name, "drop path"))
        trainer = make_trainer(place.hardware, list(place.callbacks), max_steps=steps)
        trainer.fit(module, DataLoader(batches, batch_size=None))
        module.to(data.target.budget.device)  # Lightning has moved the layers to the CPU

    steps = low_rank.fit_steps
    if any(len(each.ranks) > 1 for each in candidates.values()):
        fit(low_rank.search_steps, _searched(data, spec, seed), "search")
    else:
        steps += low_rank.search_steps
    ranks = {path: each.choose() for path, each in candidates.items()}
    if steps:
        fit(steps, RandomBatches(data, spec.batch_size, steps, derived_seed(seed, "fit")), "fit")
    for path, each in candidates.items():
        layer = part.layers[path]
        quantizer = layer.weight_quantizer
        layer.compensation = each().detach()
        own = replace(weight, bits=quantizer.bits)
        quantizer.set_range(layer.compensated_weight, own, symmetric=quantizer.signed)
    return ranks


def _searched(data: PackData, spec: ReconstructionSpec, seed: int) -> InTurns:
    """Give batches by turns for the candidates and, of held-out rows, for the choice between them."""
    steps = spec.low_rank.search_steps
    fitted, held_out = split_rows(len(data.target), spec.low_rank.held_out, derived_seed(seed, "split"))
    first = RandomBatches(data, spec.batch_size, steps, derived_seed(seed, "candidates"), fitted)
    second = RandomBatches(data, spec.batch_size, steps, derived_seed(seed, "choice"), held_out)
    return InTurns(first, second, steps)
