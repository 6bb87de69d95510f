"""Arguments of the simple types that a function declares: numbers, text, choices, functions, lists and mappings.

Python does not check them, so a wrong one would fail far away, or not at all. Other types are left to the function.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from shardtrain.errors import UserError, described, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
_FURTHER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "None"}


def typed(function: F) -> F:
    """Decorate a function so that it refuses arguments of other simple types than it declares.

    Raises:
      UserError: when called, an argument has another type; names it.

    Example:
      >>> @typed
      ... def half(n: int): return n / 2
      >>> half("4")
      Traceback (most recent call last):
      shardtrain.errors.UserError: n = 4: must be a whole number, not '4'; give one
    """
    signature = inspect.signature(function)
    hints = functools.cache(lambda: typing.get_type_hints(function))

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # too many, or too few: calling it says so
            given = {}
        for name, value in given.items():
            if name in hints() and signature.parameters[name].kind not in _FURTHER:
                require_type(name, value, hints()[name])
        return function(*args, **kwargs)

    return typing.cast(F, checked)


def require_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of a simple type.

    Raises:
      UserError: it has another type.
    """
    if not is_of(value, hint):
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal and isinstance(value, str) else ()
        fix = did_you_mean(value, choices) if choices else "give one"
        given = "" if isinstance(value, Mapping) else f", not {described(value)}"
        raise UserError(name, value, f"must be {_named(hint)}{given}", fix)


def require_fields(instance: Any) -> None:
    """Refuse a dataclass instance with a field of another simple type than it declares.

    Raises:
      UserError: a field has another type; names it.
    """
    for name, hint in typing.get_type_hints(type(instance)).items():
        require_type(name, getattr(instance, name), hint)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value has a type, as far as that is simple; a type that is not simple has every value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, each) for each in arguments)
    if origin is Literal:
        return any(is_of(value, type(each)) and value == each for each in arguments)
    if origin is Callable:
        return callable(value)
    if origin is Mapping:
        key, item = arguments
        return isinstance(value, Mapping) and all(is_of(k, key) and is_of(v, item) for k, v in value.items())
    if origin is Sequence:
        return isinstance(value, Sequence)
    if hint in (int, float):
        return is_number(value, whole=hint is int)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    return hint not in _WORDS or isinstance(value, hint)


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a value is a number, or a scalar array of them; true and false are none."""
    if hasattr(value, "dtype") and not getattr(value, "shape", ()):
        return value.dtype.kind in ("iu" if whole else "iufV")  # V: bfloat16
    return isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)


def _named(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_named, arguments))
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if typing.get_origin(hint) is Mapping:
        return f"a mapping of {' to '.join(map(_named, arguments))}"
    if typing.get_origin(hint) is Sequence:
        return "a list"
    if typing.get_origin(hint) is Callable:
        return "a function"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
