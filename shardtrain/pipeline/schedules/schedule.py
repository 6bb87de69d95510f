"""Pipeline schedules as data: tables that run in lockstep, and the published orders they come from.

Shapes: T ticks, R ranks, K phases, C chunks, M microbatches, S = R * C stages.

Within a tick, every rank runs the phases in order: all do F (or idle), then all do B, or I and then W. So neighbours do
the same kind of work at the same time, and waiting for each other costs nothing compared with the ideal.

A message that a phase sends in a tick arrives when the next tick starts, also if the next stage is on the same rank
(where that costs nothing: a rank does one F and one B per tick). So F of stage s + 1 runs at least one tick after F of
stage s, and B of stage s at least one tick after B of stage s + 1. But B of the last stage may run in the same tick as
its own F, and W in the same tick as its own I.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from shardtrain.errors import UserError

#: The phases of a tick: forward and backward, or forward, input gradient and weight gradient.
PHASES = (("F", "B"), ("F", "I", "W"))
#: The phases of a schedule without a backward pass (see `forward.py`).
FORWARD = ("F",)

#: For each stage, the (rank, chunk) that holds it.
Placement = tuple[tuple[int, int], ...]


class Action(NamedTuple):
    """One phase (`F`, `B`, `I` or `W`) of one microbatch through one of the rank's chunks."""

    phase: str
    chunk: int
    microbatch: int


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """The common fields of a table and a published order: sizes, phases, and the placement of the stages.

    Attributes:
      name: for messages and pictures.
      ranks: size of the mesh axis `pipe`.
      microbatches: per step.
      chunks: stages on each rank.
      phases: of a tick, in order.
      placement: the (rank, chunk) of each stage.
    """

    name: str
    ranks: int
    microbatches: int
    chunks: int
    phases: tuple[str, ...]
    placement: Placement

    @property
    def stages(self) -> int:
        """The number of stages, ranks times chunks."""
        return len(self.placement)

    @functools.cached_property
    def stage_RC(self) -> np.ndarray:
        """The stage that each rank's chunk holds, int32 `[ranks, chunks]`."""
        stage_RC = np.full((self.ranks, self.chunks), -1, np.int32)
        for stage, (rank, chunk) in enumerate(self.placement):
            stage_RC[rank, chunk] = stage
        return stage_RC

    def describe(self, rank: int, action: Action) -> str:
        """Describe an `action` of a `rank` in words, for messages."""
        stage = self.stage_RC[rank, action.chunk]
        return f"{action.phase} of microbatch {action.microbatch} through chunk {action.chunk} (stage {stage})"


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule(Pipeline):
    """A table that runs in lockstep.

    Attributes:
      table: int32 `[ticks, ranks, phases]`, read-only: `chunk * microbatches + microbatch`, or -1 where a rank idles.
    """

    table: np.ndarray

    def __post_init__(self) -> None:
        table = np.array(self.table, np.int32)
        table.flags.writeable = False
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "phases", tuple(self.phases))  # a list would not compare equal
        object.__setattr__(self, "placement", tuple(map(tuple, self.placement)))

    @property
    def ticks(self) -> int:
        """Length of the table."""
        return self.table.shape[0]

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """Yield every `(tick, rank, action)`, in the order of execution."""
        for tick, phase, rank in np.argwhere(self.table.transpose(0, 2, 1) >= 0).tolist():
            chunk, microbatch = divmod(int(self.table[tick, rank, phase]), self.microbatches)
            yield tick, rank, Action(self.phases[phase], chunk, microbatch)

    def when(self, phase: str) -> np.ndarray:
        """Return the tick in which each stage runs `phase` of each microbatch, int `[stages, microbatches]`."""
        ticks, ranks = np.nonzero(self.table[:, :, (index := self.phases.index(phase))] >= 0)
        chunks, microbatches = np.divmod(self.table[ticks, ranks, index], self.microbatches)
        when_SM = np.full((self.stages, self.microbatches), -1)
        when_SM[self.stage_RC[ranks, chunks], microbatches] = ticks
        return when_SM


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedOrder(Pipeline):
    """An order as published: each rank runs one action after the other, as soon as its inputs are there.

    Attributes:
      orders: for each rank, its actions.
    """

    orders: tuple[tuple[Action, ...], ...]

    def lockstep(self) -> Schedule:
        """Make a table of the same order, with at most one action per rank and tick.

        A tick then costs as much as its slowest action, which wastes time where F and B differ. If they do not
        (F = I = W) and idle ranks skip the work, the published time is reached.

        Raises:
          UserError: the ranks wait for each other forever.
        """
        done: dict[tuple[str, int, int], int] = {}
        position = [0] * self.ranks
        rows: list[np.ndarray] = []
        while any(at < len(order) for at, order in zip(position, self.orders, strict=True)):
            row = np.full((self.ranks, len(self.phases)), -1)
            for rank, order in enumerate(self.orders):
                if position[rank] == len(order):
                    continue
                action = order[position[rank]]
                if all(done.get(need, len(rows)) < len(rows) for need in needs(self, rank, action)):
                    row[rank, self.phases.index(action.phase)] = action.chunk * self.microbatches + action.microbatch
                    done[action.phase, int(self.stage_RC[rank, action.chunk]), action.microbatch] = len(rows)
                    position[rank] += 1
            if (row < 0).all():
                raise deadlock(self, position)
            rows.append(row)
        return Schedule(**shape(self), table=np.stack(rows))


def shape(pipeline: Pipeline) -> dict:
    """Return the common fields, to make a table from a published order."""
    return {field.name: getattr(pipeline, field.name) for field in dataclasses.fields(Pipeline)}


def needs(pipeline: Pipeline, rank: int, action: Action) -> list[tuple[str, int, int]]:
    """List the `(phase, stage, microbatch)` that must be done before an action of a rank."""
    phase, stage, microbatch = action.phase, int(pipeline.stage_RC[rank, action.chunk]), action.microbatch
    if phase == "F":
        return [("F", stage - 1, microbatch)] if stage > 0 else []
    if phase == "W":
        return [("I", stage, microbatch)]
    own = [("F", stage, microbatch)]
    return own if stage == pipeline.stages - 1 else [*own, (phase, stage + 1, microbatch)]


def deadlock(pipeline: PublishedOrder, position: list[int]) -> UserError:
    """Make the error for an order in which no rank can continue; `position` is the next action of each rank."""
    stuck = "; ".join(
        f"rank {rank} waits at {pipeline.describe(rank, order[at])}"
        for rank, (at, order) in enumerate(zip(position, pipeline.orders, strict=True))
        if at < len(order)
    )
    return UserError(f"schedule {pipeline.name} never ends: {stuck}; reorder the actions so that one of them can run")
