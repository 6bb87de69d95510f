"""A global batch that grows with the data: early in a run, small batches learn more from each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from shardtrain.errors import UserError, refuse


@dataclasses.dataclass(frozen=True)
class BatchGrowth:
    """The size of a batch by the rows that were consumed before it: it doubles, from `first` to `last`.

    Each size below `last` is kept for an equal share of `rows`. A batch that has begun keeps its size.

    Attributes:
      first: rows in the first batch.
      last: rows in a batch from row `rows` on.
      rows: how many rows the growth takes.

    Raises:
      UserError: `last` is not `first` doubled one or more times.

    Example:
      >>> growth = BatchGrowth(first=4, last=16, rows=100)
      >>> tuple(growth.size(row) for row in (0, 48, 52, 96, 104))
      (4, 4, 8, 8, 16)
    """

    first: int
    last: int
    rows: int

    def __post_init__(self) -> None:
        refuse(growth_problems(self.first, self.last, self.rows))

    @property
    def sizes(self) -> list[int]:
        """All sizes, the smallest first."""
        return [self.first << n for n in range(self._doublings + 1)]

    def size(self, row: int) -> int:
        """The size of a batch that begins at a row of the run."""
        return self.first << min(row * self._doublings // self.rows, self._doublings)

    @property
    def _doublings(self) -> int:
        return (self.last // self.first).bit_length() - 1


def growth_problems(first: int | None, last: int, rows: int | None) -> Iterator[UserError]:
    """Find the mistakes in the numbers of a growing batch; both `first` and `rows` are `None` for a constant one."""
    if first is None and rows is None:
        return
    if first is None or rows is None:
        name, other = ("first_batch", "growth_rows") if first is None else ("growth_rows", "first_batch")
        rule = f"a batch that grows needs it, since data.{other} is set"
        yield UserError(f"data.{name}", None, rule, f"set it, or data.{other}=null")
    elif first < 1 or first >= last or last % first or (last // first) & (last // first - 1):
        halves = [last >> n for n in range(1, last.bit_length()) if last % (1 << n) == 0]
        rule = f"doubled some times it must be data.global_batch = {last}"
        yield UserError("data.first_batch", first, rule, f"use one of {halves or 'the halves of another global_batch'}")
    elif rows < 1:
        yield UserError("data.growth_rows", rows, "must be 1 or more", "give the rows that the growth takes")
