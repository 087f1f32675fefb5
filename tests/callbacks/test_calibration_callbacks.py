"""Callbacks of the calibration passes do what the plain functions do, under a real Trainer."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from pack_ptq import Hardware, Recipe, UserError, observe, prepare, score_blocks
from pack_ptq.callbacks import (
    BitAssignment,
    FixedPacking,
    HessianPacking,
    HessianScoring,
    NoPacking,
    Observation,
    Packing,
    RandomPacking,
    UniformBits,
    WholePacking,
)
from pack_ptq.callbacks.scoring import finite_scores
from pack_ptq.datamodules import TensorData
from pack_ptq.graph.chain import Chain
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.packing import hessian_packs, random_packs
from pack_ptq.trainers import make_trainer
from pack_ptq.types import BlockScores, Unit

LABELS = torch.arange(64) % 5


def data_of(samples: Tensor, labels: Tensor | None = None) -> TensorData:
    test = (samples, LABELS[: len(samples)])
    return TensorData(samples if labels is None else (samples, labels), test, batch_size=24, num_classes=5)


def validate(chain: Chain, data: TensorData, callbacks: list[L.Callback], forward: bool = False) -> None:
    trainer = make_trainer(Hardware("cpu"), callbacks)
    trainer.validate(WholeNetwork(chain, forward), data, verbose=False)


def test_observation_sees_what_observe_sees(small_network: nn.Module, samples: Tensor, batches: list[Tensor]) -> None:
    plain, watched = (prepare(small_network, samples[:4]).chain for _ in range(2))
    observe(plain, batches)
    for what in ("extremes", "values"):
        validate(watched, data_of(samples), [Observation(what)], forward=True)
    for path, layer in watched.layers.items():
        seen, expected = layer.input_quantizer.observer, plain.layers[path].input_quantizer.observer
        assert torch.equal(seen.low, expected.low)
        assert torch.equal(seen.high, expected.high)
        assert torch.equal(seen.histogram, expected.histogram)
        assert layer.input_quantizer.watching is None
    assert plain.layers["head"].input_quantizer.observer.histogram.sum() == 64 * 8


def test_observation_refuses_nan_by_the_layers_name(small_network: nn.Module, samples: Tensor) -> None:
    chain = prepare(small_network, samples[:4]).chain
    chain.layers["blocks.1.conv1"].bias.data[0] = torch.nan
    with pytest.raises(UserError, match=r"input of layer blocks\.1\.conv2 holds NaN"):
        validate(chain, data_of(samples), [Observation("extremes")], forward=True)


@pytest.mark.parametrize(("loss", "variant"), [("kl", "paper"), ("task", "paper"), ("kl", "release")])
def test_scoring_is_score_blocks(small_chain: Chain, samples: Tensor, loss: Any, variant: Any) -> None:
    data = data_of(samples, LABELS)
    scoring = HessianScoring(loss, variant=variant)
    validate(small_chain, data, [scoring])
    pairs = list(zip(samples.split(24), LABELS.split(24), strict=True))
    assert scoring.scores == score_blocks(small_chain, pairs, 1, 4, loss, data.task_loss, variant)
    assert scoring.scores.num_samples == 64


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (24, 24), (30, 30), (64, 64), (500, 64)])
def test_scoring_on_some_samples(small_chain: Chain, samples: Tensor, asked: int, used: int) -> None:
    scoring = HessianScoring(num_samples=asked)
    validate(small_chain, data_of(samples), [scoring])
    assert scoring.scores is not None
    assert scoring.scores.num_samples == used
    expected = score_blocks(small_chain, [samples[:used]], 1, 4)
    assert scoring.scores.squared_error == pytest.approx(expected.squared_error, rel=1e-4)


def test_scoring_can_run_twice(small_chain: Chain, samples: Tensor) -> None:
    scoring = HessianScoring(num_samples=10)
    found = []
    for _ in range(2):
        validate(small_chain, data_of(samples), [scoring])
        found.append(scoring.scores)
    assert found[0] == found[1]


def test_scoring_refusals(small_chain: Chain, samples: Tensor) -> None:
    with pytest.raises(UserError, match=r"scoring\.init_args\.num_samples is 0; allowed: 1 or more"):
        HessianScoring(num_samples=0)
    with pytest.raises(UserError, match=r"scoring\.init_args\.loss is 'task', but calibration samples lack labels"):
        validate(small_chain, data_of(samples), [HessianScoring("task")])


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused(score: float) -> None:
    scores = BlockScores(("a", "b"), (1.0, score), (0.0, 0.0), (0.0, 0.0), 1)
    with pytest.raises(UserError, match=f"Hessian score of block b is {score}"):
        finite_scores(scores)


SCORES = BlockScores(("a", "b", "c", "d", "e"), (5.0, 6.0, 3.0, 4.0, 5.0), (0.0,) * 5, (1.0,) * 5, 1)


@pytest.mark.parametrize(
    ("packing", "packs"),
    [
        (HessianPacking(), [(0, 2), (2, 5)]),
        (HessianPacking(max_blocks=2), hessian_packs(list(SCORES.scores), 2)),
        (NoPacking(), [(i, i + 1) for i in range(5)]),
        (FixedPacking(2), [(0, 2), (2, 4), (4, 5)]),
        (RandomPacking(3), random_packs(5, 3)),
        (RandomPacking(3, 1), [(i, i + 1) for i in range(5)]),
        (WholePacking(), [(0, 5)]),
    ],
)
def test_packings(packing: Packing, packs: list[tuple[int, int]]) -> None:
    assert packing.packs(SCORES) == packs


def test_packing_refusals() -> None:
    for kind in (HessianPacking, RandomPacking):
        with pytest.raises(UserError, match=r"packing\.init_args\.max_blocks is 0; allowed: 1 or more"):
            kind(max_blocks=0)
    with pytest.raises(UserError, match=r"packing\.init_args\.size is 0; allowed: 1 or more"):
        FixedPacking(0)


class GrowingBits(BitAssignment):
    """An own rule, as a user writes it."""

    def pack_bits(self, units: list[Unit]) -> list[tuple[int, int]]:
        return [(2 + i, 3 + i) for i in range(len(units))]


def test_scores_packs_and_bits_in_one_pass(small_chain: Chain, samples: Tensor, small_recipe: Recipe) -> None:
    scoring, packing, uniform, growing = HessianScoring(), FixedPacking(2), UniformBits(), GrowingBits()
    uniform.recipe = growing.recipe = small_recipe
    validate(small_chain, data_of(samples), [scoring, packing, uniform, growing])
    assert [(unit.kind, unit.blocks) for unit in packing.units] == [
        ("stem", ("stem",)),
        ("pack", ("blocks.0", "blocks.1")),
        ("pack", ("blocks.2",)),
        ("head", ("head",)),
    ]
    assert uniform.plan is not None
    assert growing.plan is not None
    inner = [path for path in small_chain.layers if "blocks" in path]
    assert uniform.plan.weight == uniform.plan.activation == {"stem": 8, **dict.fromkeys(inner, 3), "head": 8}
    assert list(growing.plan.weight.values()) == [8, 3, 3, 3, 3, 4, 4, 8]
    assert list(growing.plan.activation.values()) == [8, 4, 4, 4, 4, 5, 5, 8]
    assert list(growing.plan.weight) == list(small_chain.layers)
