"""A dataset as the rest of the library sees it: rows addressed by number."""

import dataclasses
from typing import Protocol

import numpy as np

from shardtrain.errors import UserError

Row = dict[str, np.ndarray]


class Source(Protocol):
    """A fixed list of rows. `source[i]` depends only on `i`, and may be called from several threads.

    A language-model row of S tokens holds at least `tokens`, `targets`, `segment_ids`, `positions` (int32
    [S]) and `loss_mask` (float32 [S]); other models may use other names. All rows have the same names, shapes
    and dtypes. Tokens are in `0 .. vocab_size - 1`. So are targets, or they are negative where the loss must ignore
    them. The name `row` is reserved for the loader, which adds it.

    Only rows that hold several documents have `segment_ids` (int32 [S]), which keep the documents apart. They cost
    attention a mask of [B, S, S], with which fused attention on a GPU reads far more memory.
    """

    @property
    def fingerprint(self) -> str:
        """Sources with equal fingerprints have the same rows. Stored in every checkpoint."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every token id is in `0 .. vocab_size - 1`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row: ...


def window(ids: np.ndarray) -> Row:
    """Turn S + 1 consecutive token ids into one row that predicts each next id, in one segment."""
    size = len(ids) - 1
    return {
        "tokens": ids[:-1].astype(np.int32),
        "targets": ids[1:].astype(np.int32),
        "loss_mask": np.ones(size, np.float32),
        "positions": np.arange(size, dtype=np.int32),
    }


def check_row(row: int, rows: int) -> None:
    """Check that a row exists.

    Raises:
      IndexError: it is not in `0 .. rows - 1`. This also ends `for row in source`.
    """
    if not 0 <= row < rows:
        raise IndexError(f"row {row} of a source of {rows} rows")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows `start .. stop - 1` of another source.

    Attributes:
      source: the other source.
      start: its first row here.
      stop: one past its last row here.
    """

    source: Source
    start: int
    stop: int

    @property
    def fingerprint(self) -> str:
        """The whole source's, with the range."""
        return f"{self.source.fingerprint} rows={self.start}:{self.stop}"

    @property
    def vocab_size(self) -> int:
        """The whole source's."""
        return self.source.vocab_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, row: int) -> Row:
        check_row(row, len(self))
        return self.source[self.start + row]


def split(source: Source, fraction: float) -> tuple[Source, Source]:
    """Return (train, held out). The held-out rows are the last `fraction` of the source, at least one row.

    They are contiguous, so that with windows cut from one stream no target is in both parts. The parts share a single
    token: the last target of the first part is the first input of the second.

    Args:
      source: all rows.
      fraction: share of the held-out rows, between 0 and 1.

    Raises:
      UserError: either part would be empty.
    """
    if not 0 < fraction < 1:
        raise UserError(
            f"held-out fraction {fraction}: it must be above 0 and below 1; 0.05 holds out one row in twenty"
        )
    held_out = max(1, round(len(source) * fraction))
    if held_out >= len(source):
        raise UserError(
            f"held-out fraction {fraction} of {len(source)} rows leaves none to train on: use more data, "
            f"a shorter seq_len, or a smaller fraction"
        )
    cut = len(source) - held_out
    return Rows(source, 0, cut), Rows(source, cut, len(source))
