"""Each section alone: plain data in, a typed section or its problems out."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from shardtrain.config.errors import Problem
from shardtrain.config.explain import explain, unknown_key
from shardtrain.config.frozen import thaw
from shardtrain.config.model_type import ModelType, plain_json
from shardtrain.config.schema import Model, RunConfig
from shardtrain.errors import UserError

_HINTS = typing.get_type_hints(RunConfig, include_extras=True)
#: Section name to its type.
SECTIONS = {name: _HINTS[name] for name in RunConfig.model_fields}


def validate_sections(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Validate each section; an empty or absent one has only defaults.

    Returns:
      The valid sections, and the problems of the others.
    """
    problems = [unknown_key((key,), raw[key], [*SECTIONS, "extends"], SECTIONS) for key in raw if key not in SECTIONS]
    sections: dict[str, Any] = {}
    for name, schema in SECTIONS.items():
        given = raw.get(name)
        if given is None:
            is_section = isinstance(schema, type) and issubclass(schema, BaseModel)
            given = {} if is_section else thaw(RunConfig.model_fields[name].default)
        kind = None
        if schema is Model and isinstance(given, Mapping):  # the class judges all options except `type`
            kind = given.get("type")
            given = given if isinstance(kind, str) else {key: given[key] for key in ("type",) if key in given}
        try:
            if isinstance(kind, str):
                schema = ModelType.find(kind).schema
                options = {key: value for key, value in given.items() if key != "type"}
                sections[name] = Model(type=kind, options=ModelType.find(kind).options(options))
            else:
                sections[name] = TypeAdapter(schema).validate_json(plain_json(given, name))
        except ValidationError as error:
            problems += explain(error, name, given, schema, SECTIONS)
        except UserError as error:
            problems.append(Problem.of(error))
    return sections, problems
