"""Calling constructors with the user's arguments, and wording what goes wrong."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

from torch import nn

from pack_ptq.errors import UserError, refuse


def closest(name: str, known: list[str]) -> str:
    """Word which of the known names lie nearest to a wrong one."""
    near = get_close_matches(name, known, n=5, cutoff=0.6)
    return f"closest: {', '.join(near)}" if near else f"{len(known)} names, such as {', '.join(known[:3])}"


def accepted_arguments(constructor: Callable) -> str:
    """List the names a constructor takes by keyword, `...` for any further ones."""
    try:
        parameters = inspect.signature(constructor).parameters.values()
    except ValueError:  # some builtins have no signature
        return "arguments unknown"
    names = ["..." if p.kind is p.VAR_KEYWORD else p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return ", ".join(name for name in names if name != "self") or "no arguments"


def short(error: Exception) -> str:
    """Word an exception in one line: its type and the first words of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shorten(lines[0], 160, placeholder=' ...')}" if lines else type(error).__name__


Create = Callable[[bool, dict[str, Any]], nn.Module]


def build_from_library(name: str, create: Create, pretrained: bool, init_args: dict[str, Any]) -> nn.Module:
    """Build a network of a library, telling wrong arguments from weights that cannot be had.

    Args:
        name: As the user gave it, with the library's prefix.
        create: Takes whether to fetch weights, and the network's own arguments.
        pretrained: Whether `create` shall fetch weights.
        init_args: The network's own arguments.

    Raises:
        UserError: The arguments do not serve, or the weights could not be downloaded or do not fit.
    """
    try:
        return create(pretrained, init_args)
    # Libraries raise whatever their layers raise on a wrong argument, so no narrower class would do.
    except Exception as error:
        without_weights = _building_error(create, init_args) if pretrained else error
        if without_weights is None:
            raise UserError(
                f"model.pretrained is True; the weights of {name} could not be downloaded or loaded "
                f"({short(error)}); model.checkpoint FILE takes local ones"
            ) from error
        # The libraries' builders take **kwargs: only a finished network tells which class they serve.
        allowed = accepted_arguments(type(create(False, {})).__init__)
        raise refuse("model.init_args", init_args, f"{allowed} for {name} ({short(without_weights)})") from error


def _building_error(create: Create, init_args: dict[str, Any]) -> Exception | None:
    try:
        create(False, init_args)
    except Exception as error:
        return error
    return None
