"""Networks that cut gradients are found, whatever cuts them, and no others."""

import pytest
import torch
from torch import Tensor, nn

import pack_ptq
from pack_ptq import Recipe, UserError, prepare
from pack_ptq.datamodules import TensorData
from pack_ptq.graph.gradients import check_gradients
from pack_ptq.types import ReconstructionSpec, TuningSpec

CUTS = {
    "no_grad": ("blocks.0.0", lambda block, x: torch.no_grad()(block)(x)),
    "detach": ("blocks.0.0", lambda block, x: block(x).detach()),
    "data": ("stem", lambda block, x: block(x.data)),
}


class Cut(nn.Module):
    """Residual blocks, the first of which is run by a function of the block and its input."""

    def __init__(self, run=lambda block, x: block(x), in_place: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.run, self.in_place = run, in_place

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.run(self.blocks[0], x)
        y = self.blocks[1](x)
        if self.in_place:
            x += y
            return self.head(x)
        return self.head(x + y)


@pytest.mark.parametrize("how", list(CUTS))
def test_the_place_is_named(how: str) -> None:
    place, run = CUTS[how]
    chain = prepare(Cut(run).eval(), torch.randn(2, 6)).chain
    with pytest.raises(UserError, match=rf"no gradients through {place} .*recipe\.tuning\.steps 0"):
        check_gradients(chain, torch.randn(2, 6))


@pytest.mark.parametrize("in_place", [False, True])
def test_others_pass_and_keep_their_parameters(in_place: bool) -> None:
    chain = prepare(Cut(in_place=in_place).eval(), torch.randn(2, 6)).chain
    check_gradients(chain, torch.randn(2, 6))
    assert all(parameter.grad is None for parameter in chain.network.parameters())


def test_only_fits_need_gradients(tmp_path) -> None:
    data = TensorData(torch.randn(8, 6), (torch.randn(8, 6), torch.arange(8) % 3), batch_size=4)

    def run(steps: int) -> dict:
        recipe = Recipe(reconstruction=ReconstructionSpec(steps=steps), tuning=TuningSpec(steps=0))
        return pack_ptq.quantize(Cut(CUTS["no_grad"][1]), data, recipe, run_dir=tmp_path / str(steps))

    with pytest.raises(UserError, match="no gradients through"):
        run(2)
    assert not (tmp_path / "2").exists()
    assert run(0)["metrics"]["num_samples"] == 8
