"""Objects that a config names by an import path: a model, a schedule, a source of data, an optimizer."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from shardtrain.errors import UserError, did_you_mean


def find(path: str, noun: str, key: str, is_one: Callable[[Any], bool] = callable) -> Any:
    """Import a module and return the object that it calls by a name.

    Args:
      path: `package.module:name`.
      noun: the kind of object, for messages: `class`.
      key: the setting that holds the path, for messages: `model.type`.
      is_one: whether an object is of that kind.

    Raises:
      UserError: there is no such module or name, or the object is of another kind.
    """
    module_name, _, name = path.partition(":")
    shape = f"package.module:{'Class' if noun == 'class' else noun}"
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(key, path, f"{module_name!r} is not the name of a module", f"write {shape}")
    try:
        with blamed_on(key, path):
            module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        fix = f"install it, or put its folder on PYTHONPATH; write {shape}"
        raise UserError(key, path, f"importing module {module_name!r} fails: {error}", fix) from error
    found = getattr(module, name, None)
    if not is_one(found):
        known = [each for each, value in vars(module).items() if is_one(value)]
        raise UserError(key, path, f"module {module_name} has no {noun} {name!r}", did_you_mean(name, known))
    return found


def import_path(function: Any) -> str:
    """The path of a function or class, `package.module:name`; of another object, that of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


@contextlib.contextmanager
def blamed_on(key: str, path: object) -> Iterator[None]:
    """Add a line below the traceback of an exception in code of the user's own: which setting names that code."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"{key} = {path}: this error comes from there; correct it, or name another")
        raise


def accepts(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Whether a function with these parameters can be called with a keyword argument `name`."""
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def module_names(package: ModuleType) -> list[str]:
    """The names of all modules of a package, which a file in its folder is enough to be; none is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def modules_of(package: ModuleType) -> dict[str, ModuleType]:
    """All modules of a package by their names, imported."""
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in module_names(package)}
