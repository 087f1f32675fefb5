"""A small network and samples for it, shared by the tests of the upper floors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from plan_helpers import plan_for
from torch import Tensor, nn

from pack_ptq import Recipe, observe, prepare, set_ranges, tile_units
from pack_ptq.graph.chain import Chain
from pack_ptq.types import BitPlan, QuantizerSpec, ReconstructionSpec, TuningSpec, Unit

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("untimed")


class SmallBlock(nn.Module):
    """Residual block of two convolutions with BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class SmallNetwork(nn.Module):
    """Stem, three residual blocks and a head for images of 3 x 6 x 6, five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[SmallBlock(8) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture
def samples() -> Tensor:
    """Give 64 images."""
    return torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def batches(samples: Tensor) -> list[Tensor]:
    """Give the images in batches, the last one partial."""
    return list(samples.split(24))


@pytest.fixture
def small_network() -> nn.Module:
    """Give a network with moved BatchNorm statistics, in evaluation mode, without a trace in the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = SmallNetwork()
        for _ in range(5):
            network(torch.randn(32, 3, 6, 6))
    return network.eval()


@pytest.fixture
def small_recipe() -> Recipe:
    """Give three bits and a short fit, without bias corrections, so that outputs can be computed by hand."""
    return Recipe(
        QuantizerSpec(bits=3),
        QuantizerSpec(bits=3, per_channel=False),
        reconstruction=ReconstructionSpec(steps=60, batch_size=16, rounding_lr=1e-2, penalty_weight=1e-4),
        tuning=TuningSpec(steps=0),
        bias_correction="none",
    )


@pytest.fixture
def small_chain(small_network: nn.Module, batches: list[Tensor], small_recipe: Recipe) -> Chain:
    """Give the prepared network with its ranges set for `small_plan`."""
    chain = prepare(small_network, batches[0]).chain
    observe(chain, batches)
    set_ranges(chain, plan_for(chain, small_recipe), small_recipe)
    return chain


@pytest.fixture
def small_units(small_chain: Chain) -> list[Unit]:
    """Give a stem, a pack of two blocks, a pack of one, and a head."""
    return tile_units(small_chain, [(0, 2), (2, 3)])


@pytest.fixture
def small_plan(small_chain: Chain, small_recipe: Recipe) -> BitPlan:
    """Give the bits of `small_chain`."""
    return plan_for(small_chain, small_recipe)
