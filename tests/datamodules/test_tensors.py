"""In-memory data: every accepted form gives the same samples; bad numbers are refused by index."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pack_ptq.datamodules import TensorData
from pack_ptq.errors import UserError

INPUTS = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 5
PAIR = (INPUTS, LABELS)


class Pairs(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return INPUTS[index], int(LABELS[index])


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(INPUTS, LABELS, strict=True)


LABELLED = {
    "tuple": lambda: PAIR,
    "tensor dataset": lambda: TensorDataset(*PAIR),
    "own dataset": Pairs,
    "iterable dataset": Stream,
    "loader": lambda: DataLoader(TensorDataset(*PAIR), batch_size=6),
    "list": lambda: [(INPUTS[:7], LABELS[:7]), (INPUTS[7:], LABELS[7:])],
    "generator": lambda: ((INPUTS[start : start + 8], LABELS[start : start + 8]) for start in (0, 8, 16)),
    "numpy labels": lambda: [(INPUTS, LABELS.numpy())],
    "short integers": lambda: (INPUTS, LABELS.to(torch.uint8)),
    "double": lambda: (INPUTS.double(), LABELS),
}
UNLABELLED = {
    "tensor": lambda: INPUTS,
    "tensor dataset": lambda: TensorDataset(INPUTS),
    "list": lambda: [INPUTS[:7], INPUTS[7:]],
    "loader": lambda: DataLoader(TensorDataset(INPUTS), batch_size=6),
    "two batches of one size": lambda: [INPUTS[:10], INPUTS[10:]],
}


@pytest.mark.parametrize("form", LABELLED)
def test_labelled_forms(form: str) -> None:
    data = TensorData(LABELLED[form](), LABELLED[form]())
    for dataset in (data.calibration_dataset(), data.test_dataset()):
        inputs, labels = dataset[:]
        assert torch.equal(inputs, INPUTS)
        assert torch.equal(labels, LABELS)
        assert labels.dtype == torch.int64
    assert data.fingerprint() == TensorData(PAIR, PAIR).fingerprint()


@pytest.mark.parametrize("form", UNLABELLED)
def test_calibration_may_lack_labels_but_the_test_may_not(form: str) -> None:
    inputs, labels = TensorData(UNLABELLED[form](), PAIR).calibration_dataset()[:]
    assert torch.equal(inputs, INPUTS)
    assert labels.tolist() == [-1] * 20
    with pytest.raises(UserError, match=r"data\.test has no labels for 20 of 20 samples, first at index 0; allowed"):
        TensorData(PAIR, UNLABELLED[form]())


def test_iterables_are_read_once_and_copied() -> None:
    inputs = INPUTS.clone()
    data = TensorData(iter([inputs]), iter([(inputs, LABELS)]))
    inputs.zero_()
    for _ in range(2):
        assert torch.equal(torch.cat([batch for batch, _ in data.val_dataloader()]), INPUTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("source", ["calibration", "test"])
def test_first_bad_sample_is_named(value: float, source: str) -> None:
    bad = INPUTS.clone()
    bad[13, 2, 1, 1] = bad[17, 0, 0, 0] = value
    sources = {"calibration": PAIR, "test": PAIR} | {source: [(bad[:9], LABELS[:9]), (bad[9:], LABELS[9:])]}
    message = rf"data\.{source} has NaN or infinity in 2 of 20 samples, first at index 13; allowed: finite numbers"
    with pytest.raises(UserError, match=message):
        TensorData(**sources)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "0 samples; allowed: 1 or more"),
        (INPUTS[:0], "0 samples; allowed: 1 or more"),
        (INPUTS[:, 0, 0, 0], r"inputs of the shape \(20,\); allowed: \(samples, ...\)"),
        ([INPUTS, INPUTS[:, :2]], r"samples of the shapes \[\(2, 4, 4\), \(3, 4, 4\)\]; allowed: one shape"),
        ((INPUTS, LABELS[:7]), r"labels of the shape \(7,\) in int64; allowed: \(20,\) in an integer type"),
        ((INPUTS, LABELS.float()), r"labels of the shape \(20,\) in float32; allowed: \(20,\) in an integer type"),
        ((INPUTS, LABELS - 4), "the label -4 at index 0; allowed: 0 or more, -1 for none"),
        ({"images": INPUTS}, "a str; allowed: a tensor, a tuple"),
        ([{"images": INPUTS}], "a dict; allowed: a tensor, a tuple"),
        (3, "a int; allowed: a tensor, a tuple"),
        (np.zeros((4, 3)), "a ndarray; allowed: a tensor, a tuple"),
    ],
)
def test_other_forms_are_refused(calibration: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"data\.calibration has {message}"):
        TensorData(calibration, PAIR)


def test_number_of_classes_is_inferred_given_or_taken_from_the_network() -> None:
    assert TensorData(INPUTS, PAIR).num_classes == 5
    assert set(TensorData(INPUTS, PAIR, num_classes=12).metrics()) == {"top1", "top5"}
    data = TensorData(INPUTS, PAIR)
    data.check_output(torch.zeros(2, 10))
    accuracy = data.metrics()["top1"]
    accuracy.update(torch.eye(10)[LABELS], LABELS)
    assert accuracy.compute() == 1


def test_numbers_of_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.num_classes is 4; allowed: 5 or more, since a label is 4"):
        TensorData(INPUTS, PAIR, num_classes=4)
    with pytest.raises(UserError, match=r"data\.num_classes is 1; allowed: 2 or more"):
        TensorData(INPUTS, PAIR, num_classes=1)
    with pytest.raises(UserError, match="4 scores per sample; allowed: 5"):
        TensorData(INPUTS, PAIR).check_output(torch.zeros(2, 4))
    with pytest.raises(UserError, match="10 scores per sample; allowed: 5"):
        TensorData(INPUTS, PAIR, num_classes=5).check_output(torch.zeros(2, 10))


def test_fingerprint_sees_inputs_labels_and_form() -> None:
    changed = INPUTS.clone()
    changed[3, 0, 0, 0] += 1e-6
    variants = [
        TensorData(PAIR, PAIR),
        TensorData((changed, LABELS), PAIR),
        TensorData(PAIR, (changed, LABELS)),
        TensorData((INPUTS, LABELS.flip(0)), PAIR),
        TensorData(PAIR, (INPUTS, LABELS.flip(0))),
        TensorData((INPUTS.flatten(1), LABELS), PAIR),
    ]
    assert len({data.fingerprint() for data in variants}) == len(variants)
    assert TensorData(PAIR, PAIR, batch_size=3).fingerprint() == variants[0].fingerprint()
