"""The one place where Trainers are made."""

import lightning as L
from lightning.pytorch.loggers import Logger

from pack_ptq.types import Hardware


def make_trainer(
    hardware: Hardware,
    callbacks: list[L.Callback],
    logger: Logger | None = None,
    max_steps: int = -1,
    val_batches: int | None = None,
) -> L.Trainer:
    """Make a Trainer for one `fit`, `validate` or `test`; Trainers are not reused, for a second fit would do nothing.

    Several processes are started as scripts (`ddp`), once per program: spawned ones would start anew at every fit.
    """
    return L.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        strategy="ddp" if hardware.devices > 1 else "auto",
        callbacks=callbacks,
        logger=logger or False,
        max_steps=max_steps,
        max_epochs=1 if max_steps == -1 else -1,
        num_sanity_val_steps=0,
        limit_val_batches=0 if max_steps != -1 else val_batches,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
