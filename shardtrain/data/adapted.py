"""Rows of any kind as a `Source`: a list of dicts, a dict of arrays, a dataset with a length."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from shardtrain.data.source import Row, Source, check_row, window
from shardtrain.errors import UserError, described

_KINDS = "a list of dicts, a dict of arrays, or any object with a length whose elements are dicts"
#: How many rows, evenly spaced, the fingerprint reads.
_SAMPLE = 64


def as_source(rows: Any, vocab_size: int) -> Source:
    """Return rows as a source. One that follows `Source` already is returned as it is.

    64-bit integers become 32-bit ones, and so do floats unless JAX computes in 64 bits. A row that holds `tokens`
    alone, S + 1 ids, becomes the S tokens and targets of a language model.

    Args:
      rows: dicts of numbers or arrays, one per row: a sequence of them, or an iterable with a length, which is read
        into memory; or one dict of arrays `[rows, ...]`.
      vocab_size: above every token id.

    Raises:
      UserError: `rows` is something else, or empty, or its arrays differ in length.
    """
    if hasattr(rows, "fingerprint"):
        return rows
    if isinstance(rows, Mapping):
        return _Adapted(*_columns(rows), vocab_size)
    if isinstance(rows, str | bytes) or not hasattr(rows, "__len__") or isinstance(rows, type):
        raise UserError("source", None, f"is {described(rows)}, but must be {_KINDS}", "give it such rows")
    if not hasattr(rows, "__getitem__"):
        rows = list(rows)
    return _Adapted(rows.__getitem__, len(rows), vocab_size)


class _Adapted:
    """Rows that `get` returns by number."""

    def __init__(self, get: Callable[[int], Any], length: int, vocab_size: int):
        self._get, self._length, self.vocab_size = get, length, vocab_size
        if not length:
            raise UserError("source", None, "has no rows", "give it at least one")

    @functools.cached_property
    def fingerprint(self) -> str:
        """The number of rows, and a hash of up to 64 of them."""
        digest = hashlib.sha256()
        for row in sorted({int(i) for i in np.linspace(0, self._length - 1, _SAMPLE)}):
            for name, leaf in sorted(self[row].items()):
                digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
        return f"{self._length} rows {digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Row:
        check_row(row, self._length)
        found = self._get(row)
        if not isinstance(found, Mapping):
            raise UserError("source", None, f"row {row} is {described(found)}, but must be a dict", f"give it {_KINDS}")
        leaves = {name: _narrow(leaf) for name, leaf in found.items()}
        return window(leaves["tokens"]) if {*leaves} == {"tokens"} else leaves


def _columns(arrays: Mapping[str, Any]) -> tuple[Callable[[int], Row], int]:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len({*lengths.values()}) > 1:
        raise UserError("source", None, f"its arrays differ in length: {lengths}", "give them one entry per row")
    return lambda row: {name: array[row] for name, array in arrays.items()}, next(iter(lengths.values()), 0)


def _narrow(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype in (np.int64, np.uint64):
        if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
            raise UserError("source", None, f"{int(abs(array).max())} is too large for int32", "use smaller integers")
        return array.astype(np.int32)
    wide = array.dtype == np.float64 and not jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return array.astype(np.float32) if wide else array
