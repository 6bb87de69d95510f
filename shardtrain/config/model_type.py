"""The model class that `model.type` names, and the options that its signature gives a config."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from shardtrain.errors import UserError, did_you_mean
from shardtrain.host.import_path import find, module_names
from shardtrain.nn.sizes import size_options

KEY = "model.type"
#: Parameters of a model's `__init__` that do not come from a config.
PASSED = ("self", "rngs", "precision")


@dataclasses.dataclass(frozen=True)
class ModelType:
    """A model class and the options of its signature.

    Attributes:
      cls: the class.
      schema: a pydantic model with one field per option; a field's alias is the option's name.
    """

    cls: type
    schema: type[BaseModel]

    @staticmethod
    @functools.cache
    def find(name: str) -> ModelType:
        """Find the class of a type: `llama` (in shardtrain.models) or `package.module:Class`.

        Raises:
          UserError: no such module or class, a signature that a config cannot call, or wrong `size_options`.
        """
        cls = find(name, "class", KEY, inspect.isclass) if ":" in name else _builtin(name)
        size_options(cls)
        return ModelType(cls, _schema(cls, name))

    @property
    def names(self) -> list[str]:
        """The options' names."""
        return [str(field.alias) for field in self.schema.model_fields.values()]

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Validate options, and add the defaults of the others where YAML can write them.

        Returns:
          Plain data by option name.

        Raises:
          pydantic.ValidationError: an option that is missing, unknown or of another type.
        """
        model = self.schema.model_validate_json(plain_json(given, "model"))
        skipped = {
            key
            for key, field in self.schema.model_fields.items()
            if field.alias not in given and not _plain(field.default)
        }
        dumped = model.model_dump(mode="json", by_alias=True, exclude=skipped, warnings=False)
        return {name: dumped[name] for name in self.names if name in dumped}

    def arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Turn plain options into keyword arguments for `cls`, of the annotated types."""
        model = self.schema.model_validate_json(json.dumps(options))
        fields = self.schema.model_fields.items()
        return {str(info.alias): getattr(model, key) for key, info in fields if key in model.model_fields_set}


def plain_json(value: Any, path: str) -> str:
    """Write plain data as JSON.

    Raises:
      UserError: it holds something else (an array, a path), or contains itself.
    """
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        fix = "write text, numbers, true, false, null, and lists and mappings of them"
        raise UserError(path, None, f"must be plain data: {error}", fix) from error


def _builtin(name: str) -> type:
    models = importlib.import_module("shardtrain.models")  # by name: the library imports no model
    known = module_names(models)
    if name not in known:
        fix = f"{did_you_mean(name, known)} (package.module:Class for a class of your own)"
        raise UserError(KEY, name, "no model of shardtrain.models has this name", fix)
    module = importlib.import_module(f"{models.__name__}.{name}")
    for attribute, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and _bare(attribute) == _bare(name):
            return value
    rule = f"{module.__name__} has no class of this name"
    raise UserError(KEY, name, rule, f"name the class: {module.__name__}:Class")


def _schema(cls: type, name: str) -> type[BaseModel]:
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    try:
        annotations = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except NameError as error:
        rule = f"the annotations of {cls.__name__}.__init__ cannot be evaluated: {error}"
        raise UserError(KEY, name, rule, "import that name at run time, not under TYPE_CHECKING") from error
    fields: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.name in PASSED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            rule = f"{cls.__name__}.__init__ takes {parameter.name!r} by position only; a config gives names"
            raise UserError(KEY, name, rule, "make it a keyword parameter")
        default = ... if parameter.default is parameter.empty else parameter.default
        # The prefix keeps options apart from the attributes of pydantic.
        annotation = annotations.get(parameter.name, Any)
        fields[f"option_{parameter.name}"] = (annotation, Field(default, alias=parameter.name))
    if not fields and (rest := [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]):
        rule = f"{cls.__name__}.__init__ has only **{rest[0]}, and a config can give only options that it names"
        raise UserError(KEY, name, rule, "name them in its signature, such as vocab_size: int")
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    return create_model(cls.__name__, __config__=config, **fields)


def _bare(name: str) -> str:
    return name.replace("_", "").lower()


def _plain(value: Any) -> bool:
    """Whether YAML can write the value."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
