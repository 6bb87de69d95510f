"""All problems of a config, each with its path, value, rule and fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from shardtrain.errors import UserError

_MOST_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake that the user can fix.

    Attributes:
      path: dotted path of the key (`mesh.tensor`), or `file:line:column` for text that is not YAML.
      value: the value that the key has now.
      rule: the rule that it breaks.
      fix: what to write instead.
    """

    path: str
    value: Any
    rule: str
    fix: str

    @classmethod
    def of(cls, error: UserError) -> Problem:
        """Turn the refusal of a library check into a problem of the config."""
        return cls(error.key, error.value, error.rule, error.fix)

    def __str__(self) -> str:
        setting = UserError(self.path, self.value, self.rule, self.fix).setting()
        return f"{setting}\n    rule: {self.rule}\n    fix:  {self.fix}"


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
        shown = [*map(str, self.problems[:_MOST_SHOWN])]
        if count > _MOST_SHOWN:
            shown.append(f"... and {count - _MOST_SHOWN:,} more")
        super().__init__("\n  ".join([head, *shown]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.source)
