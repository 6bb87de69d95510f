"""Every key of a config with its type, default and meaning, as the schema states them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from shardtrain.config.frozen import thaw
from shardtrain.config.schema import RunConfig
from shardtrain.config.strict_yaml import dump


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config.

    Attributes:
      path: the sections that it is in, and its name.
      kind: which values it takes, in words; empty for a section.
      required: whether it has no default.
      value: its default, or an example where it is required; `None` for a section.
      meaning: what it does.
    """

    path: tuple[str, ...]
    kind: str
    required: bool
    value: Any
    meaning: str

    @property
    def is_section(self) -> bool:
        """Whether it holds keys instead of a value."""
        return not self.kind

    @property
    def shown(self) -> str:
        """Its value in YAML."""
        return dump({"value": thaw(self.value)}).removeprefix("value:").strip()


def keys() -> Iterator[Key]:
    """Go through all sections and keys, in the order of the schema."""
    schema = RunConfig.model_json_schema(schema_generator=_Quiet)
    return _keys(RunConfig, schema, schema["$defs"], ())


def as_yaml() -> str:
    """All keys as a commented config, which trains where the model's own options are added."""
    lines = []
    for key in keys():
        indent = "  " * (len(key.path) - 1)
        if key.is_section:
            lines += ["", f"{indent}# {key.meaning}", f"{indent}{key.path[-1]}:"]
        elif key.path == ("model", "options"):
            lines.append(f"{indent}# ... and {key.meaning}")
        else:
            needed = "required, " if key.required else ""
            lines += [] if indent else [""]
            lines += [f"{indent}# {key.meaning} ({needed}{key.kind})", f"{indent}{key.path[-1]}: {key.shown}"]
    return "\n".join(lines).lstrip("\n") + "\n"


def _keys(model: type[BaseModel], schema: Any, sections: Any, path: tuple[str, ...]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner = sections[field.annotation.__name__]
            yield Key((*path, name), "", field.is_required(), None, inner["description"])
            yield from _keys(field.annotation, inner, sections, (*path, name))
        else:
            value = field.examples[0] if field.is_required() and field.examples else field.default
            kind = _kind(schema["properties"][name])
            yield Key((*path, name), kind, field.is_required(), value, field.description or "")


def _kind(schema: Any) -> str:
    """Values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    name = {"string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}
    return name.get(schema["type"], schema["type"]) + _bounds(schema)


def _bounds(schema: Any) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    start = f" from {low}" if low is not None else f" above {above}" if above is not None else ""
    return start + (f" to {high}" if high is not None else f" below {below}" if below is not None else "")


class _Quiet(GenerateJsonSchema):
    """Defaults come from the fields, so those that JSON cannot hold are no loss."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012
