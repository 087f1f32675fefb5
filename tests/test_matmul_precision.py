import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pack_ptq.matmul_precision import matmul_precision
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Hardware


class Noting(torch.autograd.Function):
    """Hands a tensor through, and notes the precision of products in both directions."""

    @staticmethod
    def forward(ctx, x, notes):
        notes.append(("forward", torch.get_float32_matmul_precision()))
        ctx.notes = notes
        return x

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append(("backward", torch.get_float32_matmul_precision()))
        return grad, None


class Fitted(L.LightningModule):
    def __init__(self, notes):
        super().__init__()
        self.layer, self.notes = nn.Linear(3, 1), notes

    def training_step(self, batch, index):
        return Noting.apply(self.layer(batch), self.notes).sum()

    def on_train_batch_end(self, outputs, batch, index):
        self.notes.append(("between", torch.get_float32_matmul_precision()))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize("wanted", ["highest", "medium"])
def test_steps_and_nothing_else_have_the_precision(wanted):
    notes = []
    trainer = make_trainer(Hardware("cpu", matmul_precision=wanted), [], max_steps=2)
    trainer.fit(Fitted(notes), DataLoader(torch.ones(4, 3), batch_size=2))
    assert notes == [("forward", wanted), ("backward", wanted), ("between", "highest")] * 2
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("wanted", "fast"), [("highest", False), ("high", True), ("medium", True)])
def test_convolutions_go_with_products(wanted, fast, before):
    usual = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before
    try:
        with matmul_precision(wanted):
            assert torch.backends.cudnn.allow_tf32 is fast
        assert torch.backends.cudnn.allow_tf32 is before
    finally:
        torch.backends.cudnn.allow_tf32 = usual


def test_precision_is_set_back_after_an_error():
    with pytest.raises(RuntimeError, match="on purpose"), matmul_precision("medium"):
        raise RuntimeError("on purpose")
    assert torch.get_float32_matmul_precision() == "highest"
