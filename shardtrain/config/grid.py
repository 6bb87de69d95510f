"""Several values for a key, as in `optimizer.lr=1e-4,3e-4`: a grid of runs, one for each choice of values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from shardtrain.errors import UserError

#: Keys that are free text, where a comma is part of the value.
TEXT = ("run.name", "run.dir", "run.compile_cache", "init_from", "data.path", "sample.prompt")
_OPEN, _CLOSE = "[{(", "]})"


def grid(overrides: Sequence[str]) -> list[dict[str, str]]:
    """Every choice of one value for each key that has several, in the order in which a counter runs; `[{}]` for none.

    Args:
      overrides: of the command line. Commas within brackets, braces or quotes separate nothing.

    Raises:
      UserError: an override after one with several values is of the same key, or of a section that has it.

    Example:
      >>> grid(["a.x=1,2", "a.y=[1,2]"])
      [{'a.x': '1'}, {'a.x': '2'}]
    """
    several: dict[str, list[str]] = {}
    for override in overrides:
        key, values = _values(override)
        for swept in several:
            if f"{swept}.".startswith(f"{key}."):
                fix = f"drop one of them; the later one is {override}"
                raise UserError(swept, ",".join(several[swept]), "has several values, but a later one would win", fix)
        if len(values) > 1:
            several[key] = values
    return [dict(zip(several, choice, strict=True)) for choice in itertools.product(*several.values())]


def chosen(overrides: Sequence[str], choice: dict[str, str]) -> list[str]:
    """The overrides of one run of a grid."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    return [
        f"{key}={choice[key]}" if key in choice else override for key, override in zip(keys, overrides, strict=True)
    ]


def label(choice: dict[str, str]) -> str:
    """The name of one run of a grid, fit for a directory: `lr=1e-4,seed=2`. Keys are as short as they can be told."""
    parts = []
    for key, value in choice.items():
        names = [".".join(key.split(".")[-length:]) for length in range(1, key.count(".") + 2)]
        short = next(name for name in names if sum(("." + other).endswith("." + name) for other in choice) == 1)
        parts.append(f"{short}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', value).strip('_')}")
    return ",".join(parts)


def _values(override: str) -> tuple[str, list[str]]:
    """The key of an override, and its values."""
    key, _, text = override.partition("=")
    key = key.strip()
    if key in TEXT:
        return key, [text]
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    values = [value.strip() for value in values]
    return key, values if all(values) else [text]
