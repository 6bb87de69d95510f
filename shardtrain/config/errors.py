"""Problems in a config: every one found, each with its path, value, rule and fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from shardtrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that the user can fix.

    Attributes:
      path: dotted path of the key (`mesh.tensor`), or `file:line:column` for text that is no YAML.
      value: what stands there now.
      rule: what it breaks.
      fix: what to write instead.
    """

    path: str
    value: Any
    rule: str
    fix: str

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {_short(self.value)}"
        return f"{self.path}{shown}\n    rule: {self.rule}\n    fix:  {self.fix}"


class ConfigError(UserError):
    """All problems of one config at once.

    Attributes:
      problems: every problem found, in the order of the config's sections.
      source: the file (or other origin) that was read.
    """

    def __init__(self, problems: Iterable[Problem], source: str = "config") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        head = f"{source} has {count} problem{'s' * (count != 1)}:"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.source)


def _short(value: Any, limit: int = 200) -> str:
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
