"""The one exception that means "you can fix this", and the words that its messages share."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class UserError(ValueError):
    """A mistake in what the user asked for: `UserError(key, value, rule, fix)`, or `UserError(text)`.

    The command line prints it without a traceback and exits with code 2; any other exception is a bug of ours.

    Attributes:
      key: the setting, by its dotted key in a config (`mesh.tensor`) or by the name of the argument; empty for a text.
      value: its value now; `None` where there is none to show.
      rule: the rule that the value breaks, or the text.
      fix: what to write instead.
    """

    def __init__(self, key_or_text: str, value: object = None, rule: str | None = None, fix: str = "") -> None:
        super().__init__(*((key_or_text,) if rule is None else (key_or_text, value, rule, fix)))
        self.key, self.rule = ("", key_or_text) if rule is None else (key_or_text, rule)
        self.value, self.fix = value, fix

    def __str__(self) -> str:
        return f"{self.setting()}: {self.rule}; {self.fix}" if self.key else self.rule

    def setting(self) -> str:
        """The key and its value, as messages show them: `mesh.tensor = 3`."""
        return shortened(self.key) + ("" if self.value is None else f" = {_shown(self.value)}")


def refuse(errors: Iterable[UserError]) -> None:
    """Raise the first of the mistakes that a check finds. A config collects all of them instead."""
    for error in errors:
        raise error


def mistakes(check: Callable[..., Iterable[UserError] | None], *arguments: Any) -> Iterator[UserError]:
    """Collect the mistakes that a check finds, whether it yields them or raises one."""
    try:
        yield from check(*arguments) or ()
    except UserError as error:
        yield error


def shortened(text: str, limit: int = 200) -> str:
    """A text of any length, cut for one line of a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _shown(value: object) -> str:
    return shortened(value if isinstance(value, str) and value.isprintable() and value.strip() else repr(value))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to `name`, or `None` when none is similar."""
    spelled = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[close[0]] if close else None


#: Words of the same meaning that are spelled differently.
_SYNONYMS = {"gpu": "cuda"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest a fix for a name that does not exist: the most similar known name, or all of them."""
    known = [each for each in known if not each.startswith("_")]
    if not known:
        return "there is none to choose from"
    near = nearest(_SYNONYMS.get(name.lower(), name), known)
    return f"did you mean {near}?" if near else f"use one of {', '.join(known[:20])}"


def described(value: object) -> str:
    """Describe a value in a few words, for an error: `float32[16, 8]`, `the class Llama`, `a Mesh`, `'1f1b'`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list) and len(value) <= 4:
        return f"a {type(value).__name__} of ({', '.join(map(described, value))})"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return one(type(value))


def one(kind: type) -> str:
    """Name an instance of a class: `a Mesh`, `an int`."""
    return f"{'an' if kind.__name__[0] in 'aeiouAEIOU' else 'a'} {kind.__name__}"


def require_kind(name: str, value: object, kind: type | tuple[type, ...], fix: str) -> None:
    """Refuse an argument of the wrong type.

    Args:
      name: the argument, as messages name it.
      value: its value.
      kind: the type, or types, that it may have.
      fix: how to make a value of that type.

    Raises:
      UserError: the value has another type.
    """
    if not isinstance(value, kind):
        wanted = " or ".join(map(one, kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{name} is {described(value)}, but must be {wanted}; {fix}")
