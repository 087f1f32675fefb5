"""Null on the command line for the optional keys of a recipe's parts, as `--recipe.reconstruction.steps null`.

jsonargparse writes the value of a key two records deep into an option of its own, where null becomes the word None; a
mapping it takes as it is.
"""

import dataclasses
import json
from typing import Any, get_args

from pack_ptq.types import Recipe


def with_nulls(arguments: list[str]) -> list[str]:
    """Put a mapping, such as `--recipe.reconstruction={"steps": null}`, in the place of every null for such a key."""
    mappings = _mappings("--recipe", Recipe())
    replaced: list[str] = []
    for argument in arguments:
        if argument == "null" and replaced and replaced[-1] in mappings:
            replaced[-1] = mappings[replaced[-1]]
        else:
            option, _, value = argument.partition("=")
            replaced.append(mappings[option] if value == "null" and option in mappings else argument)
    return replaced


def _mappings(option: str, record: Any) -> dict[str, str]:
    """Give, by the option of every key in a record that may be null, the option that says so by a mapping."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            found |= _mappings(f"{option}.{field.name}", value)
        elif type(None) in get_args(field.type):
            found[f"{option}.{field.name}"] = f"{option}={json.dumps({field.name: None})}"
    return found
