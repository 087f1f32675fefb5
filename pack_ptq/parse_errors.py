"""Reword what jsonargparse finds wrong: one line that names the key, the value and what is allowed."""

import dataclasses
import inspect
import pydoc
import re
from collections.abc import Sequence
from typing import Any

from pack_ptq.datamodules import PTQData

LITERAL = re.compile(r"typing\.Literal\[([^\]]*)\]")
CLASS = re.compile(r"<class '([^']*)'>")


def reword(message: str, keys: Sequence[str]) -> str:
    """Give jsonargparse's message in the house form, or at least in one line.

    Args:
        message: Of jsonargparse, over several lines.
        keys: Those of the command, dotted where they lie inside `model`.
    """
    path, holder = _place(message)
    if unknown := re.search(r"(?:Option|option) '([^']+)'|unrecognized arguments: (?:--)?([^\s=]+)", message):
        name = unknown[1] or unknown[2]
        names = _parameters(holder) if holder is not None else _beside(name, keys)
        return f"{'.'.join([*path, name])} is no key; allowed: {', '.join(names) or 'none'}"
    if wrong := re.search(r"Expected an? (.*)\. Got value: (.*)", message):
        return f"{'.'.join(path)} is {wrong[2]!r}; allowed: {readable(wrong[1])}"
    if union := re.search(r"Subtypes: \[(.*)\]\n.*Given value: ([^\n]*)", message, re.DOTALL):
        return f"{'.'.join(path)} is {union[2]!r}; allowed: {readable(union[1])}"
    if section := re.search(r"Not a valid subclass of (\w+)\. Got value: ([^\n{]*)\n", message):
        return f"{'.'.join(path)} is {section[2]!r}; allowed: keys of {section[1]}, or class_path and init_args"
    if abstract := re.search(r"Expected an instantiatable class, but (\S+) is abstract", message):
        missing = sorted(import_class(abstract[1]).__abstractmethods__)
        return f"{'.'.join(path)}.class_path is {abstract[1]!r}; allowed: a class that has {', '.join(missing)}, too"
    lines = [line.strip() for line in message.splitlines()]
    rest = [line for line in lines if line and not line.startswith(("Parser key", "Problem with given class_path"))]
    given = f" is {holder!r}" if holder is not None and import_class(holder) is None else ""
    return (f"{'.'.join(path)}{given}: " if path else "") + "; ".join(rest)


def _place(message: str) -> tuple[list[str], str | None]:
    """Give the dotted path to the innermost key that the message names, and the class that is configured there."""
    path: list[str] = []
    holder = None
    for key, class_path in re.findall(r"Parser key \"([^\"]+)\"|given class_path '([^']+)'", message):
        if key:
            path.append(key)
            continue
        holder = class_path
        found = import_class(class_path)
        if has_init_args(found):
            path.append("class_path" if found is None else "init_args")
    return path, holder


def has_init_args(found: Any) -> bool:
    """Tell whether a class's keys lie below `init_args`, as those of every class that is chosen by its path."""
    return not dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, PTQData))


def import_class(class_path: str) -> Any:
    """Give what lies at a dotted path, or None."""
    try:
        return pydoc.locate(class_path)
    except Exception:  # a wrong path of the user's, whose module may raise anything
        return None


def _parameters(class_path: str) -> list[str]:
    return list(inspect.signature(import_class(class_path)).parameters)


def _beside(name: str, keys: Sequence[str]) -> list[str]:
    """Give the keys that have the same parent as a dotted name."""
    parent = name.rpartition(".")[0]
    beside = [key for key in keys if key.rpartition(".")[0] == parent]
    return beside or [key for key in keys if "." not in key]


def readable(types: str) -> str:
    """Word Python types as a reader of YAML knows them."""
    types = LITERAL.sub(lambda found: found[1].replace("'", ""), types)
    return CLASS.sub(lambda found: found[1].replace("NoneType", "null"), types)
