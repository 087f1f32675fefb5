"""Losses against sums that are written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq.losses import kl_from_full_precision, reconstruction_loss, same_class


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 4), (3, 2, 4, 5)])
def test_reconstruction_loss(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(shape, generator=generator) for _ in range(2))
    total = sum((a - b) ** 2 for a, b in zip(output.flatten().tolist(), target.flatten().tolist(), strict=True))
    positions = math.prod(shape) / shape[1]
    assert reconstruction_loss(output, target).item() == pytest.approx(total / positions, rel=1e-5)
    assert reconstruction_loss(target, target).item() == 0


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4, 5)])
def test_weighted_reconstruction_loss(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    output, target, weight = (torch.randn(shape, generator=generator) for _ in range(3))
    lists = [x.flatten().tolist() for x in (output, target, weight.square())]
    total = sum(w * (a - b) ** 2 for a, b, w in zip(*lists, strict=True))
    positions = math.prod(shape) / shape[1]
    assert reconstruction_loss(output, target, weight.square()).item() == pytest.approx(total / positions, rel=1e-5)
    plain = reconstruction_loss(output, target).item()
    assert reconstruction_loss(output, target, torch.ones(shape)).item() == pytest.approx(plain, rel=1e-6)


def divergence(logits: list[float], reference: list[float]) -> float:
    def softmax(x: list[float]) -> list[float]:
        powers = [math.exp(v - max(x)) for v in x]
        return [v / sum(powers) for v in powers]

    q, p = softmax(logits), softmax(reference)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=2, max_size=7))
def test_kl(pairs: list[tuple[float, float]]) -> None:
    logits, reference = [a for a, _ in pairs], [b for _, b in pairs]
    value = kl_from_full_precision(torch.tensor([logits]).double(), torch.tensor([reference]).double())
    assert value.shape == (1,)
    assert value.item() == pytest.approx(divergence(logits, reference), rel=1e-5, abs=1e-6)
    assert value.item() >= -1e-12


def test_kl_is_per_sample_and_sums_over_positions() -> None:
    logits, reference = torch.randn(2, 3, 4, 2).double(), torch.randn(2, 3, 4, 2).double()
    for sample, value in enumerate(kl_from_full_precision(logits, reference)):
        a, b = logits[sample].flatten(1).T.tolist(), reference[sample].flatten(1).T.tolist()
        assert value.item() == pytest.approx(sum(map(divergence, a, b)))


def test_kl_of_points_is_averaged_over_them() -> None:
    logits, reference = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double()
    for sample, value in enumerate(kl_from_full_precision(logits, reference)):
        pairs = zip(logits[sample].tolist(), reference[sample].tolist(), strict=True)
        assert value.item() == pytest.approx(sum(divergence(a, b) for a, b in pairs) / 5)


def test_kl_of_extreme_logits_is_finite() -> None:
    value = kl_from_full_precision(torch.tensor([[0.0, 500.0]]), torch.tensor([[500.0, 0.0]]))
    assert value.item() == pytest.approx(500.0)


@pytest.mark.parametrize(("shape", "axis"), [((40, 3), -1), ((40, 6, 3), -1), ((40, 3, 2, 5), -3)])
def test_same_class_is_a_share_of_points_or_positions(shape: tuple[int, ...], axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(shape, generator=generator) for _ in range(2))
    found = same_class(logits, reference)
    for a, b, share in zip(logits, reference, found, strict=True):
        pairs = list(zip(a.movedim(axis, -1).reshape(-1, 3), b.movedim(axis, -1).reshape(-1, 3), strict=True))
        same = [x.tolist().index(max(x.tolist())) == y.tolist().index(max(y.tolist())) for x, y in pairs]
        assert share.item() == pytest.approx(sum(same) / len(same))
    assert 0 < found.mean() < 1
    assert same_class(reference, reference).tolist() == [1] * 40
