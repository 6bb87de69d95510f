"""Objects that a config names by an import path, `package.module:name`: models, schedules, sources, optimizers."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from shardtrain.errors import UserError, did_you_mean


class NotFoundError(UserError):
    """An import path that leads nowhere.

    Attributes:
      rule: what is wrong with it.
      fix: what to write instead.
    """

    def __init__(self, rule: str, fix: str) -> None:
        self.rule, self.fix = rule, fix
        super().__init__(f"{rule}; {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rule, self.fix)


def find(path: str, noun: str, is_one: Callable[[Any], bool] = callable) -> Any:
    """Import a module and return one of its objects.

    Args:
      path: `package.module:name`.
      noun: what the object should be, for messages: `class`.
      is_one: tells whether an object is that.

    Raises:
      NotFoundError: there is no such module or name, or the object is something else.
    """
    module_name, _, name = path.partition(":")
    shape = f"package.module:{'Class' if noun == 'class' else noun}"
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise NotFoundError(f"{module_name!r} is not the name of a module", f"write {shape}")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        fix = f"install it, or put its folder on PYTHONPATH; write {shape}"
        raise NotFoundError(f"importing module {module_name!r} fails: {error}", fix) from error
    found = getattr(module, name, None)
    if not is_one(found):
        known = [key for key, value in vars(module).items() if is_one(value)]
        raise NotFoundError(f"module {module_name} has no {noun} {name!r}", did_you_mean(name, known))
    return found


def modules_of(package: ModuleType) -> dict[str, ModuleType]:
    """All modules of a package by their names, imported: a file in its folder is enough to be one of them."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
