"""The digits: a fixed and disjoint split, constants of the training part only."""

import pytest
import torch
from sklearn.datasets import load_digits

from pack_ptq.datamodules import DigitsData, digits
from pack_ptq.errors import UserError


def raw() -> torch.Tensor:
    return torch.from_numpy(load_digits().images).reshape(-1, 64) / 16


def unscaled(inputs: torch.Tensor) -> list[tuple[int, ...]]:
    """Give the pixels in 0..16 again, from the extremes that both splits have."""
    low, high = inputs.min(), inputs.max()
    return [tuple(row) for row in ((inputs - low) / (high - low) * 16).round().int().flatten(1).tolist()]


def test_splits_tile_the_whole_set() -> None:
    train, test = unscaled(digits.train_split()[0]), unscaled(digits.test_split()[0])
    everything = [tuple(row) for row in (raw() * 16).int().tolist()]
    assert sorted(train + test) == sorted(everything)
    assert (len(train), len(test)) == (1297, 500)
    assert not set(train) & set(test)


def test_form_and_scale() -> None:
    (inputs, labels), (test_inputs, test_labels) = digits.train_split(), digits.test_split()
    assert inputs.shape == (1297, 1, 8, 8)
    assert test_inputs.shape == (500, 1, 8, 8)
    assert inputs.dtype == torch.float32
    assert labels.dtype == test_labels.dtype == torch.int64
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.bincount(test_labels).tolist() == [50] * 10


def test_split_is_frozen() -> None:
    # The shipped weights were trained on this split: a change of these numbers needs new weights.
    _, labels = digits.test_split()
    source = load_digits()
    rows = {tuple(row): index for index, row in enumerate((raw() * 16).int().tolist())}
    indices = [rows[row] for row in unscaled(digits.test_split()[0])]
    assert indices == sorted(indices)
    assert source.target[indices].tolist() == labels.tolist()
    assert (indices[:5], sum(indices)) == ([0, 3, 4, 8, 13], 464946)


def test_callers_cannot_change_each_others_samples() -> None:
    digits.train_split()[0].zero_()
    assert digits.train_split()[0].std() > 0.5


def test_calibration_is_a_seeded_draw_without_replacement() -> None:
    first, again, other = (DigitsData(num_calibration=300, calibration_seed=seed) for seed in (0, 0, 1))
    inputs = first.calibration_dataset()[:][0]
    assert torch.equal(inputs, again.calibration_dataset()[:][0])
    assert not torch.equal(inputs, other.calibration_dataset()[:][0])
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    rows = unscaled(inputs)
    assert set(rows) <= set(unscaled(digits.train_split()[0]))
    assert len(set(rows)) == 300
    assert set(rows).isdisjoint(unscaled(digits.test_split()[0]))


def test_whole_training_split_may_calibrate() -> None:
    data = DigitsData(num_calibration=1297)
    data.check()
    assert len(data.calibration_dataset()) == 1297
    assert len(data.test_dataset()) == 500
    assert set(data.metrics()) == {"top1", "top5"}


@pytest.mark.parametrize("count", [0, 1298])
def test_counts_outside_the_split_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"data\.init_args\.num_calibration is {count}; allowed: 1 to 1297"):
        DigitsData(num_calibration=count)


def test_fewer_samples_than_a_batch_name_both_keys() -> None:
    message = r"batch_size is 64; allowed: 1 to 32, .*data\.init_args\.num_calibration"
    with pytest.raises(UserError, match=message):
        DigitsData(num_calibration=32).check()


def test_network_with_other_scores_is_refused() -> None:
    DigitsData().check_output(torch.zeros(2, 10))
    with pytest.raises(UserError, match="1000 scores per sample; allowed: 10"):
        DigitsData().check_output(torch.zeros(2, 1000))
