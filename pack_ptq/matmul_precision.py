"""Faster products of float32 tensors in the steps of a fit, at less precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.plugins import Precision

from pack_ptq.types import ProductPrecision


@contextmanager
def matmul_precision(precision: ProductPrecision) -> Iterator[None]:
    """Set what `torch.set_float32_matmul_precision` takes, and set it back.

    GPUs compute convolutions in TF32 unless told otherwise; here they do so where products may, too.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _set(precision, precision != "highest")
    try:
        yield
    finally:
        _set(*before)


def _set(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


class StepPrecision(Precision):
    """Runs forward and backward of every step with products of some precision.

    Tensors and all that is between the products stay float32. What a fit is compared with, ranges, scores and accuracy
    are computed outside of steps, in full.

    Args:
        products: As `torch.set_float32_matmul_precision` names it.
    """

    def __init__(self, products: ProductPrecision) -> None:
        super().__init__()
        self.products = products

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Steppable, model: L.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure, which is the step's forward and backward, and update the variables."""
        with matmul_precision(self.products):
            return super().optimizer_step(optimizer, model, closure, **kwargs)
