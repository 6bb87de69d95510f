"""Sources of the user's own, named by an import path: `data.type: package.module:Class`.

The class, or a function, is called with the keyword arguments that its signature names, out of `seq_len`, `vocab_size`
(the model's), `seed`, `path`, `tokenizer`, `tokenizer_vocab` (`data.vocab_size`), `directory` (a folder of the run's
own) and `write` (true on the one process that may write there). The result follows `shardtrain.data.Source`:

    class Counting:
        fingerprint = "counting"  # of everything that the rows depend on

        def __init__(self, seq_len: int, vocab_size: int):
            self.seq_len, self.vocab_size = seq_len, vocab_size

        def __len__(self):
            return 1000

        def __getitem__(self, row):
            return shardtrain.data.window((row + np.arange(self.seq_len + 1)) % self.vocab_size)

If rows are text, an attribute `tokenizer` follows `shardtrain.data.Tokenizer`, and a run ends with a sample.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from shardtrain.data.checks import check_tokenizer
from shardtrain.data.source import Source
from shardtrain.data.tokenizer import Tokenizer
from shardtrain.errors import UserError
from shardtrain.host.import_path import accepts, blamed_on, find

#: The required members of a `Source`.
_PARTS = ("fingerprint", "vocab_size", "__len__", "__getitem__")


def check_imported(type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments to call the class with.

    Args:
      type: the import path.
      fields: of a `Request`, by name.

    Raises:
      UserError: there is no such class, it needs another argument, or it does not take a setting that was given.
    """
    accepted = _parameters(type, _class(type))
    for name, parameter in accepted.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if name not in fields and not optional:
            rule = f"it needs {name!r}, which a config does not give"
            raise UserError("data.type", type, rule, f"it may take {', '.join(fields)}")
    for name in ("path", "tokenizer", "tokenizer_vocab"):
        if fields[name] is not None and not accepts(accepted, name):
            key = "vocab_size" if name == "tokenizer_vocab" else name
            rule = f"it has no parameter {name!r}, and data.{key} is {fields[name]!r}"
            raise UserError("data.type", type, rule, f"remove data.{key}, or add the parameter")
    return {name: value for name, value in fields.items() if accepts(accepted, name)}


def open_imported(type: str, fields: Mapping[str, Any]) -> tuple[Source, Tokenizer | None]:
    """Return the source of an import path, and its tokenizer if it has one.

    Args:
      type: the import path.
      fields: of a `Request`, by name.

    Raises:
      UserError: as `check_imported`; or the result is not a source.
    """
    arguments = check_imported(type, fields)
    with blamed_on("data.type", type):
        source = _class(type)(**arguments)
    if lacking := [part for part in _PARTS if not hasattr(source, part)]:
        raise UserError(
            f"data.type {type} returned {source!r:.80}, which has no {', no '.join(lacking)}; it must follow "
            "shardtrain.data.Source"
        )
    tokenizer = getattr(source, "tokenizer", None)
    check_tokenizer(tokenizer)
    return source, tokenizer


def _class(type: str) -> Callable[..., Any]:
    found: Callable[..., Any] = find(type, "class", "data.type")
    return found


def _parameters(type: str, found: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(found).parameters
    except ValueError as error:  # for some that are written in C
        rule = "it has no signature"
        raise UserError("data.type", type, rule, "name a class written in Python") from error
