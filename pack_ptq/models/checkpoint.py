"""Reading weights from a file, as a state dict."""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pack_ptq.errors import UserError, refuse
from pack_ptq.models.construction import short

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# Where training programs keep the weights, plain ones before their moving averages.
PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "module", "weights")
NESTED = (*PLAIN, "model_ema", "state_dict_ema")


def load_checkpoint(file: str) -> dict[str, Tensor]:
    """Read a state dict, bare or nested in a training program's checkpoint, onto the CPU.

    Only tensors and plain containers are read: a file cannot run code.

    Raises:
        UserError: There is no such file, its suffix is unknown, it is damaged, or it holds no state dict.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise refuse("model.checkpoint", file, f"a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise refuse("model.checkpoint", file, "an existing file")
    return _state_dict(_read(path, file), file)


def _read(path: Path, file: str) -> object:
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    except Exception as error:  # on arbitrary bytes the unpickler raises arbitrary exceptions
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise _damaged(file, error) from error
        allowed = f"nothing but tensors, as torch.save(network.state_dict(), FILE) writes; it holds {culprit[1]}"
        raise refuse("model.checkpoint", file, allowed) from error


def _damaged(file: str, error: Exception) -> UserError:
    # torch's own words on bytes that are no pickle advise to switch its safety off.
    reason = "no file of torch.save" if isinstance(error, UnpicklingError) else short(error)
    return refuse("model.checkpoint", file, f"a whole, undamaged file; reading it gave: {reason}")


def _state_dict(content: object, file: str) -> dict[str, Tensor]:
    while isinstance(content, Mapping) and not _is_state_dict(content):
        inner = next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not _is_state_dict(content):
        held = f"keys {list(content)[:5]}" if isinstance(content, Mapping) else type(content).__name__
        raise refuse("model.checkpoint", file, f"a state dict, bare or under {', '.join(NESTED)}; it holds {held}")
    return dict(content)  # type: ignore[call-overload, no-any-return]


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())
