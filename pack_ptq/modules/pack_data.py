"""What a fit of a part goes by: cached inputs, targets and weights of the error."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pack_ptq.cache import Storage


@dataclass(frozen=True)
class PackData:
    """What a pack is fitted to, row by row the same samples.

    Attributes:
        full_input: The pack's input in the full-precision network.
        quantized_input: The pack's input behind the quantized packs before it.
        target: The pack's output in the full-precision network.
        weight: Of every element's squared error, in the target's form; 1 if there is none.
    """

    full_input: Storage
    quantized_input: Storage
    target: Storage
    weight: Storage | None = None

    def rows(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Give the three tensors of some rows, and the weight if there is one."""
        rows = self.full_input.rows(index), self.quantized_input.rows(index), self.target.rows(index)
        return rows if self.weight is None else (*rows, self.weight.rows(index))

    def first_inputs(self, samples: int) -> Iterator[Tensor]:
        """Give the quantized inputs of the first samples, as far as there are so many, 16 at a time."""
        count = min(samples, len(self.target))
        return (self.quantized_input.rows(slice(start, min(start + 16, count))) for start in range(0, count, 16))

    def close(self) -> None:
        """Give the memory back."""
        for storage in vars(self).values():
            if storage is not None:
                storage.close()
