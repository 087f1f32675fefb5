"""What shares bits: packs, or single layers and products, each in one group."""

import pytest
import timm
import torch
from torch import Tensor, nn

from pack_ptq import observe, prepare, tile_units
from pack_ptq.bit_groups import bit_groups
from pack_ptq.graph.chain import Chain
from pack_ptq.packing import inner_links
from pack_ptq.types import Unit


class Block(nn.Module):
    """A transformer block whose queries, keys and values come from layers of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + (self.q(y) @ self.k(y).transpose(1, 2)).softmax(2) @ self.v(y)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Two blocks and a head over tokens of shape (5, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def prepared(network: nn.Module, x: Tensor) -> tuple[Chain, list[Unit]]:
    chain = prepare(network.eval(), x).chain
    observe(chain, [x])
    start, stop = inner_links(chain)
    return chain, tile_units(chain, [(0, stop - start)])


def test_packs_stay_together(small_chain: Chain, small_units: list[Unit]) -> None:
    groups = bit_groups(small_chain, small_units)
    assert [group.name for group in groups] == [unit.name for unit in small_units]
    assert [group.layers for group in groups] == [tuple(small_chain.layers_of(u.start, u.stop)) for u in small_units]
    assert [group.free for group in groups] == [False, True, True, False]


def test_layers_of_packs_part_and_run_from_their_own_link(small_chain: Chain, small_units: list[Unit]) -> None:
    stem, *inner, head = bit_groups(small_chain, small_units, "layer")
    assert (stem.layers, head.layers, stem.free, head.free) == (("stem",), ("head",), False, False)
    assert [group.name for group in inner] == [f"blocks.{block}.conv{conv}" for block in range(3) for conv in (1, 2)]
    for group in inner:
        assert group.layers == (group.name,)
        assert group.name in small_chain.layers_of(group.start, group.start + 1)


def test_layers_that_read_with_one_quantizer_stay_together() -> None:
    torch.manual_seed(0)
    chain, units = prepared(Transformer(), torch.randn(4, 5, 12))
    groups = bit_groups(chain, units, "layer")
    together = [group.layers for group in groups if len(group.layers) > 1]
    assert together == [tuple(f"blocks.{block}.{name}" for name in "qkv") for block in range(2)]
    used = [{chain.quantizers[name] for name in (*group.layers, *group.operands)} for group in groups]
    assert sum(map(len, used)) == len(set().union(*used))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(Transformer, (5, 12)), (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), (3, 32, 32)),
     (lambda: timm.create_model("mobilenetv3_small_050"), (3, 64, 64))],
)  # fmt: skip
@pytest.mark.parametrize("granularity", ["pack", "layer"])
def test_everything_is_in_one_group_and_the_ends_lie_at_the_ends(make, shape, granularity) -> None:
    torch.manual_seed(0)
    chain, units = prepared(make(), torch.randn(2, *shape))
    groups = bit_groups(chain, units, granularity)
    layers = [path for group in groups for path in group.layers]
    assert sorted(layers) == sorted(chain.layers)
    assert (layers[0], layers[-1]) == (next(iter(chain.layers)), list(chain.layers)[-1])
    operands = [name for group in groups for name in group.operands]
    assert sorted([*layers, *operands]) == sorted(chain.quantizers)
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert {name.rpartition(".")[0] for name in group.operands} <= set(chain.products)
