"""Inputs and labels in memory, gathered once from whatever form the user holds them in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pack_ptq.errors import UserError

UNLABELLED = -1
FORMS = "a tensor, a tuple (tensor, labels), a dataset, or an iterable of batches, each a tensor or (tensor, labels)"
Source: TypeAlias = Tensor | tuple[Tensor, Tensor] | Dataset | Iterable[Tensor] | Iterable[Sequence[Tensor]]


@dataclass(frozen=True)
class Samples:
    """Samples in memory.

    Attributes:
        inputs: `(samples, ...)`; floating numbers in torch's default type, float32 unless the user changed it.
        labels: `(samples,)` in int64, -1 where there is none.
    """

    inputs: Tensor
    labels: Tensor


def gather(source: Source, key: str) -> Samples:
    """Copy the source's samples into memory, on the CPU; an iterable is read once.

    Args:
        source: A tensor, a tuple (tensor, labels), a dataset, or an iterable of batches.
        key: Name of the source in refusals.

    Raises:
        UserError: The source has another form or no samples, samples differ in shape, labels do not belong one to
            one to the samples or are not integers of -1 or more, or an input is NaN or infinite.
    """
    pairs = [_pair(batch, key) for batch in _batches(source, key)]
    if not sum(len(inputs) for inputs, _ in pairs):
        raise UserError(f"{key} has 0 samples; allowed: 1 or more")
    shapes = sorted({tuple(inputs.shape[1:]) for inputs, _ in pairs})
    if len(shapes) > 1:
        raise UserError(f"{key} has samples of the shapes {shapes}; allowed: one shape for all")
    samples = Samples(torch.cat([inputs for inputs, _ in pairs]), torch.cat([labels for _, labels in pairs]))
    _refuse_not_finite(samples.inputs, key)
    _refuse_labels_below(samples.labels, key)
    return samples


def _batches(source: Source, key: str) -> Iterable[object]:
    if isinstance(source, Tensor | tuple):
        return [source]
    if isinstance(source, Dataset):
        # Only indexing is promised by a map-style dataset, and its end not even by an IndexError.
        items: Iterable = source if isinstance(source, IterableDataset) else map(source.__getitem__, _indices(source))
        return (_as_batch(item, key) for item in items)
    if isinstance(source, Iterable):
        return source
    raise _refuse_form(source, key)


def _indices(dataset: Dataset) -> range:
    return range(len(dataset))  # type: ignore[arg-type]


def _as_batch(item: object, key: str) -> object:
    if isinstance(item, Tensor):
        return item[None]
    if isinstance(item, Sequence) and 1 <= len(item) <= 2 and isinstance(item[0], Tensor):
        return [torch.as_tensor(part)[None] for part in item]
    raise _refuse_form(item, key)


def _pair(batch: object, key: str) -> tuple[Tensor, Tensor]:
    parts = [batch] if isinstance(batch, Tensor) else batch
    if not isinstance(parts, Sequence) or not 1 <= len(parts) <= 2 or not isinstance(parts[0], Tensor):
        raise _refuse_form(batch, key)
    inputs = parts[0].detach().cpu()
    if inputs.ndim < 2:
        raise UserError(f"{key} has inputs of the shape {tuple(inputs.shape)}; allowed: (samples, ...)")
    if inputs.is_floating_point():
        inputs = inputs.to(torch.get_default_dtype())
    if len(parts) == 1:
        return inputs, torch.full((len(inputs),), UNLABELLED)
    labels = torch.as_tensor(parts[1]).detach().cpu()
    if labels.shape != inputs.shape[:1] or labels.is_floating_point() or labels.is_complex():
        found = f"{tuple(labels.shape)} in {str(labels.dtype).removeprefix('torch.')}"
        raise UserError(f"{key} has labels of the shape {found}; allowed: ({len(inputs)},) in an integer type")
    return inputs, labels.long()


def _refuse_form(found: object, key: str) -> UserError:
    return UserError(f"{key} has a {type(found).__name__}; allowed: {FORMS}")


def _refuse_not_finite(inputs: Tensor, key: str) -> None:
    finite = torch.isfinite(inputs).flatten(1).all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten()
        raise UserError(
            f"{key} has NaN or infinity in {len(bad)} of {len(inputs)} samples, first at index {int(bad[0])};"
            " allowed: finite numbers"
        )


def _refuse_labels_below(labels: Tensor, key: str) -> None:
    bad = torch.nonzero(labels < UNLABELLED).flatten()
    if len(bad):
        index = int(bad[0])
        raise UserError(f"{key} has the label {int(labels[index])} at index {index}; allowed: 0 or more, -1 for none")
