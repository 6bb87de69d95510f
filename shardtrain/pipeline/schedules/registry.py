"""Schedules by name: the built-in ones, a user's own by name or import path, and CSV files."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardtrain.errors import UserError, did_you_mean
from shardtrain.host.import_path import blamed_on, find
from shardtrain.pipeline.schedules.check import check, check_trains
from shardtrain.pipeline.schedules.csv_file import from_csv
from shardtrain.pipeline.schedules.schedule import PublishedOrder, Schedule

#: `(ranks, microbatches, chunks) -> Schedule`
Builder = Callable[[int, int, int], Schedule]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered schedule.

    Attributes:
      name: used in configs.
      build: makes the table.
      published_order: makes the published order, if there is one.
      chunks: the number of chunks in pictures.
    """

    name: str
    build: Builder
    published_order: Callable[[int, int, int], PublishedOrder] | None
    chunks: int


_MOST_CELLS = 2**24
_ENTRIES: dict[str, Entry] = {}

#: Every registered schedule by its name.
registered: Mapping[str, Entry] = MappingProxyType(_ENTRIES)


def register(
    name: str, *, published_order: Callable[[int, int, int], PublishedOrder] | None = None, chunks: int = 1
) -> Callable[[Builder], Builder]:
    """Register a function `(ranks, microbatches, chunks) -> Schedule` under a name; a decorator.

    Args:
      name: used in configs.
      published_order: makes the published order.
      chunks: the number of chunks in pictures.

    Raises:
      UserError: the name is taken, or would be read as that of a file or as an import path.
    """
    if name in _ENTRIES or name.endswith(".csv") or ":" in name:
        raise UserError(
            f"schedule name {name!r} is taken, or that of a CSV file or an import path; register it under another name"
        )

    def add(build: Builder) -> Builder:
        _ENTRIES[name] = Entry(name, build, published_order, chunks)
        return build

    return add


def get(name: str) -> Entry:
    """The schedule of that name: a registered one, or the function of an import path, `package.module:function`.

    Raises:
      UserError: there is none; suggests the nearest name.
    """
    if ":" in name:
        return Entry(name, _imported(name), None, 1)
    if name not in _ENTRIES:
        fix = f"{did_you_mean(name, _ENTRIES)}, or a .csv file, or an import path: package.module:function"
        raise UserError("pipeline.schedule", name, "there is no such schedule", fix)
    return _ENTRIES[name]


def _imported(name: str) -> Builder:
    build: Builder = find(name, "function", "pipeline.schedule")
    try:
        inspect.signature(build).bind(1, 1, 1)
    except (TypeError, ValueError) as error:  # ValueError: written in C, it has no signature
        raise UserError(
            f"pipeline schedule {name!r} cannot be called with (ranks, microbatches, chunks): {error}; a schedule is "
            "a function of these three arguments that returns a Schedule"
        ) from error
    return build


def make(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The checked schedule for these sizes.

    Args:
      name: a registered name, an import path `package.module:function`, or the path of a `.csv` file.
      ranks: size of the mesh axis `pipe`.
      microbatches: per step.
      chunks: stages on each rank.

    Raises:
      UserError: no such schedule, sizes that it does not allow, or a wrong table; its key is `pipeline.schedule`.
    """
    try:
        return _made(name, ranks, microbatches, chunks)
    except UserError as error:
        if error.key:
            raise
        raise UserError("pipeline.schedule", name, error.rule, "or choose another schedule") from error


def _made(name: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    sizes = {"ranks": ranks, "microbatches": microbatches, "chunks": chunks}
    for what, size in sizes.items():
        if size < 1:
            raise UserError(f"pipeline {what} {size} must be 1 or more")
    if (cells := ranks * chunks * (microbatches + ranks)) > _MOST_CELLS:
        raise UserError(
            f"pipeline ranks {ranks} x chunks {chunks} x (microbatches {microbatches} + ranks) = {cells:,} is above "
            f"{_MOST_CELLS:,}, the largest table of a schedule; use fewer"
        )
    with blamed_on("pipeline.schedule", name):
        schedule = from_csv(name) if name.endswith(".csv") else get(name).build(ranks, microbatches, chunks)
    if not isinstance(schedule, Schedule):
        raise UserError(
            f"schedule {name} returned {type(schedule).__name__} {schedule!r:.80}; it must return a Schedule, as "
            "shardtrain.pipeline.schedules.tabulate makes it"
        )
    for what, size in sizes.items():
        if getattr(schedule, what) != size:
            raise UserError(
                f"schedule {name} is for {what} {getattr(schedule, what)}, not {size}; "
                f"ask for {what} {getattr(schedule, what)}, or take another schedule"
            )
    check(schedule)
    check_trains(schedule)
    return schedule


def published_order(name: str, ranks: int, microbatches: int, chunks: int = 1) -> PublishedOrder | None:
    """The published order for these sizes, checked; `None` where the schedule states none.

    Raises:
      UserError: as `make`.
    """
    if name.endswith(".csv") or (entry := get(name)).published_order is None:
        return None
    order = entry.published_order(ranks, microbatches, chunks)
    check(order.lockstep())
    return order
