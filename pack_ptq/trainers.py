"""The one place where Trainers are made."""

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pack_ptq.errors import refuse
from pack_ptq.matmul_precision import StepPrecision
from pack_ptq.types import Hardware


def is_first_process() -> bool:
    """Tell whether this process writes files and speaks to the user; also right before Lightning starts the others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def check_hardware(hardware: Hardware) -> None:
    """Refuse devices that this machine does not have, before any work starts.

    Raises:
        UserError: Lightning finds no such accelerator, or fewer devices.
    """
    try:
        make_trainer(hardware, [])
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        found = "auto, cpu" + (f", gpu with devices of 1 to {count}" if (count := torch.cuda.device_count()) else "")
        wanted = f"{hardware.accelerator} with hardware.devices {hardware.devices}"
        raise refuse("hardware.accelerator", wanted, f"{found} ({error})") from error


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
        plugins=[StepPrecision(hardware.matmul_precision)],
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
