"""Objects as configuration: what is written builds the same object again."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pack_ptq import ModelSource
from pack_ptq.callbacks import (
    Evaluation,
    FixedPacking,
    HessianPacking,
    HessianScoring,
    NoPacking,
    RandomPacking,
    UniformBits,
    WholePacking,
)
from pack_ptq.datamodules import TensorData
from pack_ptq.describe import describe, describe_model

PARTS = [
    (HessianPacking(3), {"max_blocks": 3}),
    (HessianPacking(), {"max_blocks": None}),
    (FixedPacking(4), {"size": 4}),
    (RandomPacking(7, 2), {"seed": 7, "max_blocks": 2}),
    (NoPacking(), {}),
    (WholePacking(), {}),
    (HessianScoring("task", 5), {"loss": "task", "num_samples": 5, "variant": "paper"}),
    (UniformBits(), {}),
    (Evaluation(), {}),
]


@pytest.mark.parametrize(
    ("part", "arguments"), PARTS, ids=lambda v: type(v).__name__ if not isinstance(v, dict) else ""
)
def test_callbacks_can_be_built_again(part: Any, arguments: dict[str, Any]) -> None:
    found = describe(part)
    assert found == {"class_path": f"pack_ptq.callbacks.{type(part).__name__}", "init_args": arguments}
    module, name = found["class_path"].rsplit(".", 1)
    assert describe(getattr(importlib.import_module(module), name)(**found["init_args"])) == found


class Own:
    def __init__(self, folder: Path, sizes: tuple[int, ...], table: torch.Tensor, lost: int = 1) -> None:
        self.folder, self.sizes, self.table = folder, sizes, table


def test_only_plain_values_are_written() -> None:
    found = describe(Own(Path("a/b"), (1, 2), torch.ones(1)))
    assert found == {"class_path": f"{__name__}.Own", "init_args": {"folder": "a/b", "sizes": [1, 2]}}


def test_samples_in_memory_are_left_out() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    found = describe(TensorData((x, y), (x, y), batch_size=2))
    assert found["class_path"] == "pack_ptq.datamodules.TensorData"
    assert found["init_args"] == {"batch_size": 2, "num_workers": 0, "num_classes": 3}


def test_models() -> None:
    assert describe_model(nn.Sequential()) == {"class_path": "torch.nn.modules.container.Sequential"}
    source = ModelSource(name="timm/resnet18", blocks=["layer1.*"])
    found = describe_model(source)
    assert found == {"name": "timm/resnet18", "blocks": ["layer1.*"]}
    assert ModelSource(**found) == source
