"""Null for keys: given to those that may be null, as `--recipe.reconstruction.steps null`, and refused for others.

jsonargparse writes the value of a key two records deep into an option of its own, where null becomes the word None; a
mapping it takes as it is. In YAML, and for the keys of a class, it lets null pass whatever the key's type.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from pack_ptq.errors import refuse
from pack_ptq.parse_errors import has_init_args, import_class, readable
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
        elif _may_be_null(field.type):
            found[f"{option}.{field.name}"] = f"{option}={json.dumps({field.name: None})}"
    return found


def refuse_nulls(owner: Callable[..., Any], values: Namespace, path: tuple[str, ...] = ()) -> None:
    """Refuse null where the type of a parameter has no null, also inside classes that are given by their path.

    Args:
        owner: The function or class that takes the values.
        values: As jsonargparse has read them, before it makes objects of them.
        path: Keys above them.

    Raises:
        UserError: A key is null and may not be.
    """
    hints = _hints(owner)
    parameters = inspect.signature(owner).parameters
    for name, value in vars(values).items():
        here = (*path, name)
        is_default = name in parameters and parameters[name].default is None
        if value is None and not is_default and not _may_be_null(hints.get(name, Any)):
            raise refuse(".".join(here), "null", readable(str(hints[name])))
        if not isinstance(value, Namespace):
            continue
        if set(vars(value)) == {"class_path", "init_args"}:
            found = import_class(value.class_path)
            if found is not None:
                refuse_nulls(found, value.init_args, (*here, "init_args") if has_init_args(found) else here)
        elif inspect.isclass(hints.get(name)):
            refuse_nulls(hints[name], value, here)


def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(owner.__init__ if inspect.isclass(owner) else owner)
    except NameError:  # names that only a type checker sees, in a module of the user's
        return {}


def _may_be_null(hint: Any) -> bool:
    return hint in (Any, object, None, type(None)) or type(None) in get_args(hint)
