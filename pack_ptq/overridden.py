"""Which of the keys for every run a recipe has values of its own for, which go before them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

CLASS = "class_path"


def overridden(keys: Sequence[str], recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give the keys whose value a recipe changes, each with what the recipe has (`stated`) and the key's (`given`).

    Args:
        keys: Arguments of `pack-ptq quantize`; configurations among them are not looked into.
        recipe: Content of its file.
    """
    stated = dict(_flat("", recipe))
    found = {}
    for key, text in _values(keys).items():
        for name, value in _flat(key, _read(text)):
            own = name if name in stated else f"{name}.{CLASS}"  # a class may be given without the word
            if own in stated and not _is_same(own, stated[own], value):
                found[own] = {"stated": stated[own], "given": value}
    return found


def in_words(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what `overridden` gives, as `recipe.reconstruction.batch_size 32 instead of 16`."""
    return ", ".join(
        f"{key} {_word(value['stated'])} instead of {_word(value['given'])}" for key, value in found.items()
    )


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}".lstrip("."), inner)
    else:
        yield prefix, value


def _values(keys: Sequence[str]) -> dict[str, str]:
    """Give the text of every option, the last one where it comes more than once."""
    found = {}
    for argument, following in zip(keys, [*keys[1:], ""], strict=True):
        if argument.startswith("--"):
            key, equals, text = argument.removeprefix("--").partition("=")
            found[key] = text if equals else following
    return found


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # as the command line takes it


def _is_same(key: str, stated: Any, given: Any) -> bool:
    if key.endswith(f".{CLASS}") and "." not in str(given):  # the command line takes names alone, too
        return str(stated).rsplit(".", 1)[-1] == given
    return bool(_plain(stated) == _plain(given))


def _plain(value: Any) -> Any:
    """Give a number for what YAML takes for a word, such as 7e-3."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return [_plain(item) for item in value] if isinstance(value, list) else value


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
