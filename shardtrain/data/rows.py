"""The checks of a source and its rows: before the first batch, and again for each batch while it is made."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shardtrain.data.source import Row, Rows, Source
from shardtrain.errors import UserError

#: Dtypes of the leaves of a row of tokens, by name.
_LANGUAGE = {
    "tokens": np.dtype(np.int32),
    "targets": np.dtype(np.int32),
    "segment_ids": np.dtype(np.int32),
    "positions": np.dtype(np.int32),
    "loss_mask": np.dtype(np.float32),
}
#: The leaves with one entry per token. Targets and their weights may be something other than the next tokens.
_BY_POSITION = ("tokens", "segment_ids", "positions")
MASK = "loss_mask"


class RowCheck:
    """The names, shapes and dtypes of the rows of a source, learnt from one row, which all others must share.

    Args:
      source: whose rows they are.
      number: the row to learn from.

    Raises:
      UserError: a source or row is not valid; names the source, the row and the leaf.
    """

    def __init__(self, source: Source, number: int):
        self._source = name_of(source)
        self.first = source[number]
        self._check_row(number, self.first)
        self._leaves = {name: (leaf.shape, leaf.dtype) for name, leaf in self.first.items()}
        self._vocab_size = self._vocabulary(source) if "tokens" in self.first else None

    def stack(self, rows: Sequence[Row], numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the leaves [rows, ...] of some rows. Their numbers in the source are for messages."""
        try:
            stacked = {name: np.stack([row[name] for row in rows]) for name in self._leaves}
            alike = all((leaf.shape[1:], leaf.dtype) == self._leaves[name] for name, leaf in stacked.items())
            alike = alike and all(len(row) == len(stacked) for row in rows)
        except (KeyError, TypeError, ValueError, IndexError):
            alike = False
        if not alike:
            self._compare(rows, numbers)  # one row after the other, which takes longer
        self._check_ids(stacked, numbers)
        return stacked

    def _compare(self, rows: Sequence[Row], numbers: Sequence[int]) -> None:
        """Name the row that differs from the first one, in a `UserError`."""
        for number, row in zip(numbers, rows, strict=True):
            self._check_row(number, row)
            if row.keys() != self._leaves.keys():
                rule = f"other rows have {', '.join(self._leaves)}"
                raise self._error(number, f"has the names {', '.join(row)}", rule)
            for name, (shape, dtype) in self._leaves.items():
                leaf = row[name]
                if (leaf.shape, leaf.dtype) != (shape, dtype):
                    rule = f"it must be {dtype} of shape {shape}, as in other rows"
                    raise self._error(number, f"{name!r} is {leaf.dtype} of shape {leaf.shape}", rule)
        raise AssertionError("rows that are alike did not stack")

    def _check_row(self, number: int, row: Any) -> None:
        self._check_names(number, row)
        for name in sorted(row, key=lambda name: name != "tokens"):  # with which the others are compared
            self._check_leaf(number, name, row[name], row.get("tokens"))

    def _check_names(self, number: int, row: Any) -> None:
        if not isinstance(row, Mapping) or not row:
            what = "an empty dict" if isinstance(row, Mapping) else f"of type {type(row).__name__}"
            raise self._error(number, f"is {what}", "it must be a dict of NumPy arrays by name")
        if "row" in row:
            raise UserError(f"{self._source}: rows must not have a leaf 'row', because the loader adds it; rename it")

    def _check_leaf(self, number: int, name: str, leaf: Any, tokens: Any) -> None:
        if not isinstance(getattr(leaf, "dtype", None), np.dtype):
            fix = "it must be a NumPy array; use np.asarray(..., dtype)"
            raise self._error(number, f"{name!r} is of type {type(leaf).__name__}", fix)
        dtype = leaf.dtype
        if tokens is not None and name in _LANGUAGE:
            if dtype != _LANGUAGE[name]:
                fix = f"it must be {_LANGUAGE[name]}; use .astype(np.{_LANGUAGE[name]})"
                raise self._error(number, f"{name!r} is {dtype}", fix)
            if name in _BY_POSITION and (not leaf.shape or leaf.shape[0] != tokens.shape[0]):
                fix = "it must have one entry per position, as many as 'tokens' [S]"
                raise self._error(number, f"{name!r} has shape {leaf.shape}", fix)
        if dtype.kind in "OUSMm":
            raise self._error(number, f"{name!r} is {dtype}", "it must hold numbers")
        if dtype in (np.int64, np.uint64, np.float64, np.complex128) and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            narrow = np.dtype(f"{dtype.kind}{dtype.itemsize // 2}")
            fix = f"JAX would silently convert it to {narrow}; use .astype(np.{narrow})"
            raise self._error(number, f"{name!r} is {dtype}", fix)

    def _check_ids(self, stacked: Mapping[str, np.ndarray], numbers: Sequence[int]) -> None:
        if self._vocab_size is None:
            return
        limit, tokens, targets = self._vocab_size, stacked["tokens"], stacked.get("targets")
        # As an unsigned number, a negative id is a large one: one pass instead of two.
        if tokens.size and int(tokens.view(np.uint32).max()) >= limit:
            rule = f"ids must be in 0 .. {limit - 1} for its vocab_size {limit}; correct the ids, or vocab_size"
            raise self._bad_id("tokens", (tokens < 0) | (tokens >= limit), tokens, numbers, rule)
        if targets is not None and targets.size and int(targets.max()) >= limit:
            rule = f"targets must be below its vocab_size {limit}, or negative where the loss must ignore them"
            raise self._bad_id("targets", targets >= limit, targets, numbers, rule)

    def _bad_id(self, name: str, bad: np.ndarray, ids: np.ndarray, numbers: Sequence[int], rule: str) -> UserError:
        row, *position = map(int, np.argwhere(bad)[0])
        where = f" at position {position[0]}" if position else ""
        return self._error(numbers[row], f"{name!r} holds {ids[row, *position]}{where}", rule)

    def _vocabulary(self, source: Source) -> int:
        size = getattr(source, "vocab_size", None)
        if not isinstance(size, int | np.integer) or size < 1:
            raise UserError(
                f"{self._source}: its vocab_size is {size!r}; a source of tokens must have one, above all of its ids"
            )
        return int(size)

    def _error(self, number: int, what: str, rule: str) -> UserError:
        return UserError(f"{self._source}, row {number}: {what}; {rule}")


def check_last_batch(source: Source, row: Row, rows: int, global_batch: int) -> None:
    """Check that rows which only fill up the last batch can be marked as not counting.

    Args:
      source: for messages.
      row: one of its rows.
      rows: number of rows that the loader will deliver.
      global_batch: rows in a batch.

    Raises:
      UserError: the rows do not fill the last batch, and have no `loss_mask`.
    """
    if rows % global_batch and MASK not in row:
        raise UserError(
            f"{name_of(source)}: its rows have no {MASK!r}, and {rows} rows do not fill batches of {global_batch}: the "
            f"{-rows % global_batch} rows that fill up the last batch would count; give rows a {MASK!r}, or use a "
            f"global batch of which {rows} is a multiple"
        )


def counted_targets(row: Row) -> np.ndarray:
    """The targets of a row that count: all that are token ids, but those that its `loss_mask`, if any, leaves out."""
    targets = row.get("targets", np.zeros(0, np.int32))
    return targets[(targets >= 0) & (row.get(MASK, np.ones(targets.shape)) > 0)]


def name_of(source: Any) -> str:
    """Name a source for messages: by its class or, for a part of a source, by the class of the whole."""
    while isinstance(source, Rows):
        source = source.source
    return f"source {type(source).__name__}"
