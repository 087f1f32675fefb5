"""Networks of the user's own classes."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from pack_ptq.current_folder import make_importable
from pack_ptq.errors import UserError, refuse
from pack_ptq.models.construction import accepted_arguments, closest, short
from pack_ptq.models.loaded import LoadedModel
from pack_ptq.types import Preprocessing


def build_class(class_path: str, init_args: dict[str, Any]) -> LoadedModel:
    """Import `package.module.Class` and call it; a function that gives a network serves as well.

    Modules of the current folder can be imported. An attribute `preprocessing` of the network is taken along.

    Raises:
        UserError: Nothing of this name can be imported, it does not give a network, or the arguments do not serve.
    """
    constructor = _import(class_path)
    network = _construct(class_path, constructor, init_args)
    if not isinstance(network, nn.Module):
        raise refuse("model.class_path", class_path, f"a torch.nn.Module; it gives {type(network).__name__}")
    preprocessing = getattr(network, "preprocessing", None)
    return LoadedModel(network, preprocessing if isinstance(preprocessing, Preprocessing) else None)


def _import(class_path: str) -> Callable:
    module_name, _, name = class_path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in class_path.split(".")):
        raise refuse("model.class_path", class_path, "package.module.Class")
    make_importable()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        reason = f"module {module_name!r} cannot be imported: {short(error)}"
        raise refuse("model.class_path", class_path, f"package.module.Class ({reason})") from error
    found = getattr(module, name, None)
    if found is None:
        raise refuse("model.class_path", class_path, f"a class of {module_name}; {closest(name, _networks(module))}")
    if not callable(found) or (isinstance(found, type) and not issubclass(found, nn.Module)):
        raise refuse("model.class_path", class_path, "a subclass of torch.nn.Module or a function that gives one")
    return found


def _networks(module: object) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]


def _construct(class_path: str, constructor: Callable, init_args: dict[str, Any]) -> object:
    try:
        inspect.signature(constructor).bind(**init_args)
    except TypeError as error:
        allowed = f"{accepted_arguments(constructor)} for {class_path} ({error})"
        raise refuse("model.init_args", init_args, allowed) from error
    except ValueError:  # some builtins have no signature
        pass
    try:
        return constructor(**init_args)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything on a value it does not take
        allowed = f"values that {class_path} takes ({accepted_arguments(constructor)}); it raised {short(error)}"
        raise refuse("model.init_args", init_args, allowed) from error
