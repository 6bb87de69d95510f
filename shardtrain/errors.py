"""The one exception that means "you can fix this", and what its messages share."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message names the value, the rule that it breaks, and what to change. The command line prints it without
    a traceback and exits with code 2; any other exception is a bug of ours.
    """


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, or `None` when nothing is near."""
    spelled = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[close[0]] if close else None


#: Words that are near in meaning and far in spelling.
_SYNONYMS = {"gpu": "cuda"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A fix for a name that does not exist: the nearest that does, or all of them."""
    known = [each for each in known if not each.startswith("_")]
    if not known:
        return "there is none to choose from"
    near = nearest(_SYNONYMS.get(name.lower(), name), known)
    return f"did you mean {near}?" if near else f"use one of {', '.join(known[:20])}"


def described(value: object) -> str:
    """A value in a few words, for an error: `float32[16, 8]`, `the class Llama`, `a Mesh`, `'1f1b'`."""
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
    """One of a class: `a Mesh`, `an int`."""
    return f"{'an' if kind.__name__[0] in 'aeiouAEIOU' else 'a'} {kind.__name__}"


def require_kind(name: str, value: object, kind: type | tuple[type, ...], fix: str) -> None:
    """Refuse an argument of another kind than `name` takes.

    Raises:
      UserError: names the argument, what came, what it takes and how to make that.
    """
    if not isinstance(value, kind):
        wanted = " or ".join(map(one, kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{name} is {described(value)}, but must be {wanted}; {fix}")
