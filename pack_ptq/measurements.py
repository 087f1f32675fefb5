"""Measurements that several runs share: what one has measured, another on the same network and samples need not."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pack_ptq.digests import network_digest, tensor_bytes
from pack_ptq.distributed import all_reduce, barrier
from pack_ptq.graph.chain import Chain
from pack_ptq.quant.quantizers import WeightMode
from pack_ptq.runs import RunFolder
from pack_ptq.states import ranges_state
from pack_ptq.trainers import is_first_process


@dataclass(frozen=True)
class Measurements:
    """A folder with a file for each network that was measured, named by everything its outputs depend on.

    Attributes:
        folder: Made on the first write.
        conditions: What else a measurement depends on: samples, metrics, device.
    """

    folder: Path
    conditions: tuple[str, ...]

    def file(self, chain: Chain, weights: WeightMode) -> Path:
        """Give the file of a network as it stands, with its weights in a mode."""
        digest = hashlib.sha256()
        _add(digest, [*self.conditions, weights, network_digest(chain.network), ranges_state(chain)])
        return self.folder / f"{digest.hexdigest()}.json"

    @staticmethod
    def read(file: Path) -> dict[str, Any] | None:
        """Give what was measured, if it was and every process sees it."""
        there = torch.tensor(int(file.exists()))
        return json.loads(file.read_text()) if int(all_reduce(there, "min")) else None

    @staticmethod
    def write(file: Path, values: dict[str, Any]) -> None:
        """Keep what was measured."""
        barrier()  # all have looked
        if is_first_process():
            RunFolder.write_json(file, values)


def _add(digest: "hashlib._Hash", value: Any) -> None:
    """Add nested values; every one says its kind and size first, so that no two nestings are the same bytes."""
    if isinstance(value, Mapping):
        value = [item for key in sorted(value) for item in (key, value[key])]
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}:".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for item in value:
            _add(digest, item)
    else:
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)}:".encode())
        digest.update(text)
