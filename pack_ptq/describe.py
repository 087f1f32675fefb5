"""Write objects down as configuration: `class_path` and `init_args`."""

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from pack_ptq.models import ModelSource

SHORT = ("pack_ptq.callbacks", "pack_ptq.datamodules")


def describe(part: Any) -> dict[str, Any]:
    """Give an object as `class_path` and `init_args`.

    By house rule every init argument is kept as an attribute of its own name. What has no plain form (a tensor) is left
    out; it is known by the data's fingerprint.
    """
    names = inspect.signature(type(part).__init__).parameters
    values = {name: getattr(part, name) for name in names if name != "self" and hasattr(part, name)}
    module = next(
        (package for package in SHORT if type(part).__module__.startswith(f"{package}.")), type(part).__module__
    )
    return {
        "class_path": f"{module}.{type(part).__qualname__}",
        "init_args": {name: _plain(value) for name, value in values.items() if _is_plain(value)},
    }


def describe_model(model: ModelSource | nn.Module) -> dict[str, Any]:
    """Give the model's part of the configuration; a network given as an object is known by its class only."""
    if isinstance(model, nn.Module):
        return {"class_path": f"{type(model).__module__}.{type(model).__qualname__}"}
    return {key: value for key, value in asdict(model).items() if value not in (None, {}, False)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | Path)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
