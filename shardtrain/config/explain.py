"""Pydantic's errors for an invalid section, in the user's words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from shardtrain.config.errors import Problem
from shardtrain.errors import did_you_mean, nearest

Path = tuple[str | int, ...]

#: Kind of error, by pydantic's name -> rule and fix.
_WORDS = {
    "int_type": ("must be an integer", "write a whole number"),
    "int_from_float": ("must be an integer", "write a whole number"),
    "float_type": ("must be a number", "write a number"),
    "finite_number": ("must be a finite number", "write a finite number"),
    "bool_type": ("must be a boolean", "write true or false"),
    "string_type": ("must be text", "write text, in quotes if it looks like something else"),
    "string_pattern_mismatch": ("must be letters, digits, _, - and . only", "leave out other characters"),
    "list_type": ("must be a list", "write a list, such as [a, b]"),
    "tuple_type": ("must be a list", "write a list, such as [a, b]"),
    "dict_type": ("must be a mapping", "write keys with values, such as {a: 1}"),
    "mapping_type": ("must be a mapping", "write keys with values, such as {a: 1}"),
}


def explain(
    error: ValidationError, section: str, given: Any, schema: Any, sections: Mapping[str, Any]
) -> list[Problem]:
    """Turn pydantic's errors into problems, one per path; pydantic reports each member of a union separately.

    Args:
      error: the errors of the section.
      section: its name.
      given: its plain data.
      schema: the type that it was validated against, whose fields have examples and defaults.
      sections: the schemas of all sections, for keys that are in the wrong one.
    """
    found: dict[Path, Problem] = {}
    for item in error.errors(include_url=False):
        where, value = _locate(given, item)
        problem = _problem((section, *where), value, item, schema, sections)
        if first := found.get(where):
            rules = first.rule.split(", or ")
            rule = first.rule if problem.rule in rules else f"{first.rule}, or {problem.rule}"
            problem = Problem(first.path, first.value, rule, first.fix)
        found[where] = problem
    # Where an item of a list is wrong, do not also report that the list is not text.
    return [problem for where, problem in found.items() if not any(longer[:-1] == where for longer in found if longer)]


def unknown_key(path: Path, value: Any, known: Iterable[str], sections: Mapping[str, Any]) -> Problem:
    """Report a key that does not exist, with the most similar one here, or the same one in another section."""
    known, key = list(known), str(path[-1])
    elsewhere = [f"{name}.{key}" for name, schema in sections.items() if key in _keys(schema)]
    fix = did_you_mean(key, known)
    if elsewhere and nearest(key, known) is None:
        fix = f"did you mean {elsewhere[0]}?"
    return Problem(".".join(map(str, path)), value, "there is no such key", fix)


def _locate(given: Any, item: Any) -> tuple[Path, Any]:
    """Find a value in the given data, and its path without the names of union members that pydantic adds."""
    value, where = given, ()
    for i, key in enumerate(item["loc"]):
        inside = isinstance(value, Mapping) and key in value
        if inside or (isinstance(value, list) and isinstance(key, int)):
            value, where = value[key], (*where, key)  # type: ignore[assignment]
        elif item["type"] == "missing" and i == len(item["loc"]) - 1:
            return (*where, key), None
    return where, value


def _problem(path: Path, value: Any, item: Any, schema: Any, sections: Mapping[str, Any]) -> Problem:
    dotted, kind = ".".join(map(str, path)), item["type"]
    siblings, field = _field(schema, path[1:])
    example = f"for example {dotted}={field.examples[0]}" if field and field.examples else ""
    if kind == "extra_forbidden":
        return unknown_key(path, value, siblings, sections)
    if kind == "missing":
        return Problem(dotted, None, "this key is required", example or f"give {dotted} a value{_type(field)}")
    if kind == "literal_error":
        rule = item["msg"].replace("Input should be", "must be")
        return Problem(dotted, value, rule, did_you_mean(str(value), _choices(item["ctx"]["expected"])))
    if kind == "model_type":
        keys = ", ".join(_keys(sections.get(dotted, field.annotation if field else None)))
        return Problem(dotted, value, "must be a section with keys of its own", f"write its keys below it: {keys}")
    rule, fix = _WORDS.get(kind, (item["msg"].replace("Input should", "must"), "choose a value in that range"))
    if rule == "must be an integer" and isinstance(value, float) and value.is_integer():
        example = f"write {int(value)}"
    fix = example or fix
    if field is not None and not field.is_required() and isinstance(field.default, bool | int | float | str | None):
        fix += f" (default: {json.dumps(field.default)})"
    return Problem(dotted, value, rule, fix)


def _field(schema: Any, where: Path) -> tuple[list[str], FieldInfo | None]:
    """The keys of the section of `where`, and the field at `where` if the schema has one."""
    siblings: list[str] = []
    field = None
    for part in where:
        siblings = _keys(schema)
        field = dict(zip(siblings, schema.model_fields.values(), strict=True)).get(str(part)) if siblings else None
        schema = field.annotation if field else None
    return siblings, field


def _keys(schema: Any) -> list[str]:
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        return []
    return [info.alias or name for name, info in schema.model_fields.items()]


def _type(field: FieldInfo | None) -> str:
    name = getattr(field.annotation, "__name__", None) if field else None
    return f" ({name})" if name else ""


def _choices(expected: str) -> list[str]:
    return [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
