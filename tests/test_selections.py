"""What point networks pick by, against what their forward passes say; plain torch counts like the own operators."""

import pytest
import torch
from e2e_helpers import TinyNet, _one_thread
from plan_helpers import plan_for
from torch import Tensor, nn

from pack_ptq import Recipe, observe, prepare, set_ranges
from pack_ptq.models import (
    DGCNN,
    DensePoint,
    DGCNNSegmentation,
    PointNet,
    PointNet2,
    PointNet2Segmentation,
    PointTransformer,
    PointTransformerSegmentation,
    SolidsPointNet,
)
from pack_ptq.selections import find_selections
from pack_ptq.types import QuantizerSpec

__all__ = ["_one_thread"]

FPS, BALL = "farthest_point_sampling", "ball_query"
RECIPE = Recipe(QuantizerSpec(4, observer="minmax"), QuantizerSpec(4, per_channel=False, observer="minmax"))  # quick


def found_in(network: nn.Module, x: Tensor) -> dict[bool, set[tuple[str, str]]]:
    """Give the calls with their modules, by whether they read full-precision coordinates."""
    chain = prepare(network, x).chain
    observe(chain, [x])
    before = chain.network(x)
    set_ranges(chain, plan_for(chain, RECIPE), RECIPE)
    for layer in chain.layers.values():
        quantizer = layer.weight_quantizer
        quantizer.set_codes(quantizer.nearest_codes(layer.weight), quantizer.scale)
    found = find_selections(chain, x)
    assert torch.equal(chain.network(x), before), "all quantizers are off again"
    assert len(found) == len(set(found))
    return {full: {(s.call, s.module) for s in found if s.full_precision == full} for full in (True, False)}


def clouds(channels: int = 3) -> Tensor:
    x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0)) / 2
    category = torch.zeros(2, 40, channels - 3)
    category[..., :1] = 1
    return torch.cat([x, category], 2)


def in_stages(call: str, *stages: str) -> set[tuple[str, str]]:
    return {(call, stage) for stage in stages}


@pytest.mark.parametrize("network", [SolidsPointNet, lambda: PointNet(input_transform=True, feature_transform=True)])
def test_pointnet_picks_nothing(network):
    assert found_in(network(), clouds()) == {True: set(), False: set()}


def test_images_are_not_picked_from():
    assert found_in(TinyNet(), torch.randn(2, 3, 8, 8)) == {True: set(), False: set()}


@pytest.mark.parametrize("grouping", ["single", "multi"])
def test_pointnet2_groups_by_coordinates_only(grouping):
    stages = "abstraction1", "abstraction2"
    expected = in_stages(FPS, *stages) | in_stages(BALL, *stages)
    assert found_in(PointNet2(grouping=grouping), clouds()) == {True: expected, False: set()}


def test_densepoint_groups_by_coordinates_only():
    sampled, convolved = ("pool1", "pool2"), ("conv1", "conv2", "conv3")
    expected = in_stages(FPS, *sampled) | in_stages(BALL, *sampled, *convolved)
    assert found_in(DensePoint(), clouds()) == {True: expected, False: set()}


def test_point_transformer_attends_by_coordinates_only():
    downs = [f"encoder.{i}.0" for i in range(1, 5)]
    expected = in_stages(FPS, *downs) | in_stages("knn", *downs, *[f"encoder.{i}.1.attention" for i in range(5)])
    assert found_in(PointTransformer(), clouds()) == {True: expected, False: set()}


def test_dgcnn_groups_by_coordinates_once_and_then_by_features():
    later = in_stages("knn", *[f"edge_conv{i}.layer" for i in (2, 3, 4)])
    assert found_in(DGCNN(), clouds()) == {True: {("knn", "edge_conv1")}, False: later}


def test_dgcnn_aligns_coordinates_by_quantized_layers():
    network = DGCNNSegmentation(num_categories=4)
    nn.init.normal_(network.alignment.layer.matrix.weight, std=0.1)  # untrained it is the identity
    later = in_stages("knn", *[f"edge_conv{i}.layer" for i in (1, 2, 3)])
    assert found_in(network, clouds(7)) == {True: {("knn", "alignment.layer.points.edge_conv")}, False: later}


def test_interpolation_reads_coordinates_in_full_precision():
    coded = [f"encoder.{i}.stage" for i in range(2)]
    expected = in_stages(FPS, *coded) | in_stages(BALL, *coded)
    expected |= in_stages("knn", *[f"decoder.{i}.stage" for i in range(3)])
    assert found_in(PointNet2Segmentation(num_categories=4), clouds(7)) == {True: expected, False: set()}
    found = found_in(PointTransformerSegmentation(num_categories=4), clouds(7))
    assert ("knn", "decoder.0.stage.transition") in found[True]
    assert found[False] == set()


class Plain(nn.Module):
    """A stage as public implementations write it: plain torch, with loops, masks and sorting."""

    def __init__(self, by_features: bool) -> None:
        super().__init__()
        self.embed, self.group, self.head = nn.Linear(3, 8), nn.Linear(11, 16), nn.Linear(16, 5)
        self.by_features = by_features

    def forward(self, x: Tensor) -> Tensor:
        features = self.embed(x)
        by = features if self.by_features else x
        chosen = self.sample(by, 6)
        centres = by.gather(1, chosen[..., None].expand(-1, -1, by.shape[2]))
        squared = (centres[:, :, None] - by[:, None]).square().sum(-1)
        index = torch.arange(by.shape[1]).repeat(len(x), 6, 1)
        index[squared > 4.0] = by.shape[1] - 1
        index = index.sort(-1)[0][..., :8]
        both = torch.cat([x, features], 2)
        rows = index.flatten(1)[..., None].expand(-1, -1, 11)
        grouped = self.group(both.gather(1, rows).unflatten(1, (6, 8)))
        return self.head(torch.max(torch.max(grouped, 2)[0], 1)[0])

    def sample(self, points: Tensor, count: int) -> Tensor:
        latest = torch.zeros(len(points), 1, dtype=torch.long)
        distance, order = torch.full(points.shape[:2], torch.inf), []
        for _ in range(count):
            order.append(latest)
            centre = points.gather(1, latest[..., None].expand(-1, -1, points.shape[2]))
            distance = torch.minimum(distance, (points - centre).square().sum(-1))
            latest = distance.argmax(1, keepdim=True)
        return torch.cat(order, 1)


@pytest.mark.parametrize("by_features", [True, False])
def test_networks_in_plain_torch(by_features):
    found = found_in(Plain(by_features), clouds())
    assert found == {not by_features: {("argmax", ""), ("gt", "")}, by_features: set()}


class Activated(nn.Module):
    """Masks and maxima that pick nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = torch.where(y > 0, y, 0.1 * y).masked_fill(y > 3, 3.0)
        return self.last(torch.max(y, 1)[0])


def test_masks_and_unread_indices_pick_nothing():
    assert found_in(Activated(), clouds()) == {True: set(), False: set()}
