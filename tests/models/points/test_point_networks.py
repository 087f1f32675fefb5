"""What all networks for point clouds have in common."""

import pytest
import torch
from torch import nn

from pack_ptq.graph.prepare import prepare
from pack_ptq.models.points import (
    DGCNN,
    DensePoint,
    DGCNNSegmentation,
    PointNet,
    PointNet2,
    PointNet2Segmentation,
    PointNetSegmentation,
    PointTransformer,
    PointTransformerSegmentation,
)

TRANSFORMS = {"input_transform": True, "feature_transform": True}
CLASSIFIERS = {
    "pointnet": lambda: PointNet(),
    "pointnet with T-Nets": lambda: PointNet(**TRANSFORMS),
    "pointnet++ SSG": lambda: PointNet2(),
    "pointnet++ MSG": lambda: PointNet2(grouping="multi"),
    "dgcnn": lambda: DGCNN(),
    "point transformer": lambda: PointTransformer(),
    "densepoint": lambda: DensePoint(),
}
SEGMENTERS = {
    "pointnet": lambda: PointNetSegmentation(),
    "pointnet with T-Nets": lambda: PointNetSegmentation(**TRANSFORMS),
    "pointnet++ SSG": lambda: PointNet2Segmentation(),
    "dgcnn": lambda: DGCNNSegmentation(),
    "point transformer": lambda: PointTransformerSegmentation(),
}
PARAMETERS = {
    "pointnet": 819_624,
    "pointnet with T-Nets": 3_480_049,
    "pointnet++ SSG": 1_475_688,
    "pointnet++ MSG": 1_747_368,
    "dgcnn": 1_810_088,
    "point transformer": 3_165_480,
    "densepoint": 528_632,
}
BLOCKS = {
    "pointnet": [*[f"feature_model.conv{i}" for i in range(1, 6)], "linear1", "linear2", "linear3"],
    "pointnet++ SSG": ["abstraction1", "abstraction2", "abstraction3", "head"],
    "pointnet++ MSG": ["abstraction1", "abstraction2", "abstraction3", "head"],
    "dgcnn": ["edge_conv1.mlp.conv1", *[f"edge_conv{i}.layer.mlp.conv1" for i in (2, 3, 4)], "fusion.conv1", "head"],
    "point transformer": [f"encoder.{i}.{part}" for i in range(5) for part in ("0.mlp.conv1", "1")] + ["head"],
    "densepoint": [*[f"pool{i}.mlps.0.conv1" for i in (1, 2)], "conv1", "conv2", "conv3", "pool3.mlp.conv1", "head"],
}
SEGMENTER_BLOCKS = {
    "pointnet with T-Nets": ["layer1", "layer2", "layer3", "layer4", "layer5", "head"],
    "pointnet++ SSG": [*[f"encoder.{i}" for i in range(3)], *[f"decoder.{i}" for i in range(3)], "head"],
    "dgcnn": ["alignment", "edge_conv1", "edge_conv2", "edge_conv3", "context", "head"],
    "point transformer": [*[f"encoder.{i}" for i in range(5)], *[f"decoder.{i}" for i in range(4)], "head"],
}


def ready(network: nn.Module) -> nn.Module:
    """Give the network with random alignments instead of identities."""
    for name, parameter in network.named_parameters():
        if name.endswith("matrix.weight"):
            nn.init.normal_(parameter, std=0.1)
    return network.eval().requires_grad_(False)


def with_category(points: torch.Tensor, categories: int = 16) -> torch.Tensor:
    one_hot = torch.eye(categories)[torch.arange(len(points)) % categories]
    return torch.cat([points, one_hot[:, None].expand(-1, points.shape[1], -1)], 2)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name):
    network = ready(CLASSIFIERS[name]())
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
    assert network(torch.randn(2, 40, 3)).shape == (2, 40)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_order_of_the_points_does_not_matter(name):
    # Sampling starts at the first point, which therefore stays; no ball holds more points than are seen of it.
    network, x = ready(CLASSIFIERS[name]()), torch.randn(2, 16, 3) / 2
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(15)])
    torch.testing.assert_close(network(x[:, order]), network(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_scores_follow_their_points(name):
    network, x = ready(SEGMENTERS[name]()), with_category(torch.randn(2, 16, 3) / 2)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(15)])
    scores = network(x)
    assert scores.shape == (2, 16, 50)
    torch.testing.assert_close(network(x[:, order]), scores[:, order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_category_counts(name):
    network, x = ready(SEGMENTERS[name]()), with_category(torch.randn(1, 16, 3))
    other = torch.cat([x[..., :3], x[..., 3:].roll(1, 2)], 2)
    assert not torch.allclose(network(x), network(other), atol=1e-5)


@pytest.mark.parametrize("points", [torch.randn(2, 5, 3), torch.ones(2, 30, 3), torch.zeros(2, 1, 3)])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_few_and_equal_points(name, points):
    assert ready(CLASSIFIERS[name]())(points).isfinite().all()


@pytest.mark.parametrize("points", [torch.randn(2, 5, 3), torch.ones(2, 30, 3), torch.zeros(2, 1, 3)])
@pytest.mark.parametrize("name", SEGMENTERS)
def test_few_and_equal_points_of_parts(name, points):
    assert ready(SEGMENTERS[name]())(with_category(points)).isfinite().all()


@pytest.mark.parametrize("name", BLOCKS)
def test_every_stage_of_a_classifier_is_a_block(name):
    check_blocks(ready(CLASSIFIERS[name]()), torch.randn(3, 40, 3), BLOCKS[name])


@pytest.mark.parametrize("name", SEGMENTER_BLOCKS)
def test_every_stage_of_a_segmenter_is_a_block(name):
    check_blocks(ready(SEGMENTERS[name]()), with_category(torch.randn(3, 40, 3)), SEGMENTER_BLOCKS[name])


def check_blocks(network, x, names):
    prepared = prepare(network, x[:2])
    assert list(prepared.chain.names) == names
    assert prepared.left_out == ()
    # Normalising before a layer cannot be folded; all else is.
    kept = [p for p, m in prepared.chain.network.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert all("before" in path or "after" in path or "attention" in path or "bn2" in path for path in kept)
    y = x
    for index in range(len(names)):
        y = prepared.chain.run(y, index, index + 1)
    torch.testing.assert_close(y, network(x), rtol=1e-3, atol=1e-4)


def test_part_of_the_calls_is_recorded():
    prepared = prepare(ready(PointNet2()), torch.randn(2, 64, 3))
    assert len(prepared.chain.trace.calls) < 60  # farthest-point sampling alone makes hundreds


@pytest.mark.parametrize(("network", "link"), [(PointNet(), 4), (DensePoint(), 5), (DGCNN(), 4)])
def test_what_is_left_of_all_points_ends_the_unit_that_reads_them(network: nn.Module, link: int) -> None:
    x = torch.randn(2, 128, 3, generator=torch.Generator().manual_seed(0))
    chain = prepare(ready(network), x).chain
    assert chain.run(x, 0, link).ndim == 3
    assert chain.run(x, 0, link + 1).ndim == 2
