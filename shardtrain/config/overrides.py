"""Overrides from the command line: `mesh.tensor=4 optimizer.lr=3e-4`, values read as strict YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardtrain.config.errors import ConfigError, Problem
from shardtrain.config.strict_yaml import parse


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Assign each override in `raw`, in order (a later one wins); a mapping replaces the whole section.

    Validation of the sections finds keys that do not exist.

    Args:
      raw: the sections, which are changed.
      overrides: texts such as `mesh.tensor=4`.

    Returns:
      The problems of overrides that are not `key=value`, that are not YAML, or whose key is below a value.
    """
    problems: list[Problem] = []
    for override in overrides:
        try:
            _assign(raw, override)
        except ConfigError as error:
            problems += error.problems
    return problems


def _assign(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        rule = "an override is a dotted key, an equals sign and a value"
        raise ConfigError([Problem(f"override {override!r}", None, rule, "write it like mesh.tensor=4")])
    if parts == ["extends"]:
        raise ConfigError([Problem("extends", text, "an override cannot extend", "name that file instead")])
    value = parse(text, f"override {override!r}")
    section: Any = raw
    for depth, part in enumerate(parts[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            above = ".".join(parts[:depth])
            rule = f"{above} is a value, not a section with keys of its own"
            raise ConfigError([Problem(key, text, rule, f"set all of it: {above}=...")])
    section[parts[-1]] = value
