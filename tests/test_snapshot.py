"""Snapshots of what is learned: of a part before, in and after a fit."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part, unit_part
from pack_ptq.graph.switch import switch
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.snapshot import Snapshot
from pack_ptq.types import ReconstructionSpec, Unit

UNIT = Unit("pack", ("blocks.0", "blocks.1"), 1, 3)
SPEC = ReconstructionSpec(batch_size=16, bias_lr=0.1)


def part_of(chain: Chain) -> Part:
    part = unit_part(chain, UNIT, "01 pack")
    for number, layer in enumerate(part.layers.values()):
        layer.corrects_mean = True
        layer.correction = nn.Parameter(torch.full_like(layer.bias, 0.1 * number), requires_grad=False)  # type: ignore[arg-type]
    return part


def output(part: Part, x: Tensor, weights: Any) -> Tensor:
    switch(part.operations, weights, activations=True)
    with torch.no_grad():
        return part.run(x)


def boundary(samples: Tensor) -> Tensor:
    return samples.new_zeros(4, 8, 6, 6).uniform_(generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def disturb(part: Part) -> None:
    """Move all that a fit may move, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(1)
    for layer in part.layers.values():
        quantizer = layer.weight_quantizer
        if quantizer.rounding is not None and quantizer.log_factor is not None:
            quantizer.rounding += 3 * torch.randn(quantizer.rounding.shape, generator=generator)
            quantizer.log_factor += 0.2
        layer.correction += 1.0  # type: ignore[operator]
    for activation in part.quantizers:
        activation.scale.mul_(1.5)
        activation.lower.add_(0.5)


def test_outside_a_fit_it_is_rounding_to_nearest(small_chain: Chain, samples: Tensor) -> None:
    part, x = part_of(small_chain), boundary(samples)
    expected = output(part, x, "nearest")
    first = [copy.deepcopy(layer.state_dict()) for layer in part.layers.values()]
    taken = Snapshot.of(part)
    for layer in part.layers.values():
        layer.weight_quantizer.scale = layer.weight_quantizer.scale * 3
        layer.weight_quantizer.zero_point = layer.weight_quantizer.zero_point + 1
    disturb(part)
    assert not torch.equal(output(part, x, "nearest"), expected)
    taken.put_back(part)
    assert torch.equal(output(part, x, "hard"), expected)
    for layer, before in zip(part.layers.values(), first, strict=True):
        after = layer.state_dict()
        # The correction has taken up what the rounded weights add on average.
        assert all(torch.equal(after[key], value) for key, value in before.items() if key != "correction")
        assert layer.corrects_mean
        assert not torch.equal(after["correction"], before["correction"])
        assert after.keys() - before.keys() == {"weight_quantizer.codes"}


def test_in_a_fit_it_is_what_the_fit_would_give_now(small_chain: Chain, samples: Tensor) -> None:
    part, x = part_of(small_chain), boundary(samples)
    nearest = Snapshot.of(part)
    module = PackReconstruction(part, SPEC, 10, seed=0)
    disturb(part)
    expected = output(part, x, "settled")
    taken = Snapshot.of(part)
    disturb(part)
    module.end()
    taken.put_back(part)
    assert torch.equal(output(part, x, "hard"), expected)
    nearest.put_back(part)
    assert not torch.equal(output(part, x, "hard"), expected)


def test_parts_without_corrections_have_none_afterwards(small_chain: Chain) -> None:
    part = unit_part(small_chain, UNIT, "01 pack")
    taken = Snapshot.of(part)
    for layer in part.layers.values():
        layer.correction = nn.Parameter(torch.ones(8))
    taken.put_back(part)
    assert all(layer.correction is None for layer in part.layers.values())
