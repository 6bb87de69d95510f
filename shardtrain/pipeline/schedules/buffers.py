"""From a schedule to a program: which buffer slot every action and message uses, by register allocation.

A value (a stage input, an output gradient, ...) is alive from the moment it is written to its last use. Values that are
alive at the same time get different slots: colouring an interval graph, which needs no more slots than values are ever
alive at once. What the executor then needs per tick and rank is a row of small integers.

Shapes: T ticks, R ranks, C chunks.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from shardtrain.pipeline.schedules.build import ring
from shardtrain.pipeline.schedules.check import check
from shardtrain.pipeline.schedules.schedule import FORWARD, Schedule

#: Kinds of buffers: stage inputs, gradients of stage outputs, residuals of F, and what W needs from I.
KINDS = ("x", "g", "r", "w")

# Moments within a tick.
_ARRIVE, _F, _B, _W, _MOMENTS = 0, 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Segment:
    """Ticks `start` to `stop` (exclusive), in all of which some rank runs each of `phases` and none runs another.

    `messages` are the columns (`x_down`, `g_up`, ...) in which anything arrives there; `first` and `last` the
    phases that some rank runs on the first, or last, stage.
    """

    start: int
    stop: int
    phases: tuple[str, ...]
    messages: tuple[str, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A schedule with its buffers: all that the executor needs.

    Attributes:
      schedule: what it runs.
      columns: int32 `[ticks, ranks]` each, -1 for none. Which of them exist follows from the schedule and the options.

        ==================== =========================================================================================
        F, B or I, W         what to do: `chunk * microbatches + microbatch`
        x_down, x_up, x_same slot for the stage input that arrives as the tick starts: from the rank before, the rank
                             after, or this rank itself
        g_down, g_up, g_same the same for a gradient
        F_x                  slot of the stage input; on the first stage, the slot to store it in, if anything keeps it
        F_r, F_g             slot to store residuals in; on the last stage, also the gradient that the loss sends back
        B_x, B_r, B_g        slots of what to use; no B_g on the last stage if the loss is computed there and then
        I_x, I_r, I_g        the same, for a split backward
        I_w, W_w             slot to store in, or take from, what W needs of I
        ==================== =========================================================================================
      slots: number of slots of each kind in `KINDS`, the most that any rank needs. (Where ranks that idle write too,
        the executor adds a slot for what nobody reads.)
      slots_by_rank: number of slots that each rank needs, by kind.
      edges: for each message column, the (from, to) pairs of ranks that its permute joins: an open chain, unless the
        placement goes round. Empty for `x_same` and `g_same`, where a rank keeps its own.
    """

    schedule: Schedule
    columns: Mapping[str, np.ndarray]
    slots: Mapping[str, int]
    slots_by_rank: Mapping[str, tuple[int, ...]]
    edges: Mapping[str, tuple[tuple[int, int], ...]]

    def segments(self) -> list[Segment]:
        """Runs of ticks with the same phases active on some rank, in order; together they are all ticks."""
        active_TK = np.any(self.schedule.table >= 0, axis=1)
        cuts = [0, *(1 + np.flatnonzero((active_TK[1:] != active_TK[:-1]).any(axis=1))).tolist(), len(active_TK)]
        return [self.segment(start, stop) for start, stop in itertools.pairwise(cuts)]

    def segment(self, start: int, stop: int) -> Segment:
        """What goes on from tick `start` to `stop` (exclusive), taken together."""
        schedule, ticks = self.schedule, range(start, stop)
        phases = tuple(phase for phase in schedule.phases if (self.columns[phase][start:stop] >= 0).any())
        messages = tuple(name for name in self.edges if (self.columns[name][start:stop] >= 0).any())
        first, last = (
            tuple(phase for phase in phases if np.isin(schedule.when(phase)[stage], ticks).any()) for stage in (0, -1)
        )
        return Segment(start, stop, phases, messages, first, last)


@dataclasses.dataclass(frozen=True)
class _Value:
    """Something that lies in a slot of a rank from `born` to `dies` (moments), and the columns that name the slot."""

    kind: str
    rank: int
    born: int
    dies: int
    columns: tuple[tuple[str, int], ...]  # (column, tick)


def allocate(schedule: Schedule, *, save_residuals: bool = False) -> Program:
    """Give every value a slot.

    Args:
      schedule: is checked.
      save_residuals: the backward uses what F kept, rather than the stage input to compute F again.

    Raises:
      UserError: the schedule is not right.
    """
    check(schedule)
    if schedule.phases == FORWARD:
        values = list(_inputs(schedule))
    else:
        values = list(_values(schedule, "r" if save_residuals else "x"))
    slots_by_rank = {kind: [0] * schedule.ranks for kind in KINDS}
    columns = _actions(schedule)
    edges = message_edges(schedule)
    for name in (*edges, *(name for value in values for name, _ in value.columns)):
        columns.setdefault(name, np.full((schedule.ticks, schedule.ranks), -1, np.int32))
    for kind in KINDS:
        for rank in range(schedule.ranks):
            here = [value for value in values if (value.kind, value.rank) == (kind, rank)]
            colours = _colour(here)
            slots_by_rank[kind][rank] = 1 + max(colours, default=-1)
            for value, slot in zip(here, colours, strict=True):
                for name, tick in value.columns:
                    columns[name][tick, rank] = slot
    return Program(
        schedule,
        columns,
        {kind: max(counts) for kind, counts in slots_by_rank.items()},
        {kind: tuple(counts) for kind, counts in slots_by_rank.items()},
        edges,
    )


def _actions(schedule: Schedule) -> dict[str, np.ndarray]:
    return {phase: np.ascontiguousarray(schedule.table[:, :, k]) for k, phase in enumerate(schedule.phases)}


def _inputs(schedule: Schedule) -> Iterator[_Value]:
    """The input of every stage but the first, for every microbatch, where nothing needs it after F."""
    when = schedule.when("F").tolist()
    for stage, (rank, _) in enumerate(schedule.placement[1:], 1):
        for before, tick in zip(when[stage - 1], when[stage], strict=True):
            columns = ((f"x_{direction(schedule, stage - 1)}", before + 1), ("F_x", tick))
            yield _Value("x", rank, _MOMENTS * (before + 1) + _ARRIVE, _MOMENTS * tick + _F, columns)


def _values(schedule: Schedule, kept: str) -> Iterator[_Value]:
    """Every value of every stage and microbatch. `kept` is the kind (x or r) that the backward starts from."""
    b, split = schedule.phases[1], "W" in schedule.phases
    when = {phase: schedule.when(phase).tolist() for phase in schedule.phases}
    last = schedule.stages - 1
    if kept == "r":
        yield from _inputs(schedule)
    for stage, (rank, _) in enumerate(schedule.placement):
        for m in range(schedule.microbatches):
            tf, tb = when["F"][stage][m], when[b][stage][m]
            f, back = _MOMENTS * tf + _F, _MOMENTS * tb + _B
            arrival = () if stage == 0 else ((f"x_{direction(schedule, stage - 1)}", when["F"][stage - 1][m] + 1),)
            born = _MOMENTS * arrival[0][1] + _ARRIVE if arrival else f
            if kept == "x":
                yield _Value("x", rank, born, back, (*arrival, ("F_x", tf), (f"{b}_x", tb)))
            else:
                yield _Value("r", rank, f, back, (("F_r", tf), (f"{b}_r", tb)))
            if stage < last:
                tick = when[b][stage + 1][m] + 1
                arrival = ((f"g_{BACK[direction(schedule, stage)]}", tick),)
                yield _Value("g", rank, _MOMENTS * tick + _ARRIVE, back, (*arrival, (f"{b}_g", tb)))
            elif kept == "r":
                yield _Value("g", rank, f, back, (("F_g", tf), (f"{b}_g", tb)))
            if split:
                tw = when["W"][stage][m]
                yield _Value("w", rank, back, _MOMENTS * tw + _W, (("I_w", tb), ("W_w", tw)))


def _colour(values: list[_Value]) -> list[int]:
    """A slot for each value; always the lowest that is free."""
    slots = [0] * len(values)
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (dies, slot)
    for index in sorted(range(len(values)), key=lambda i: values[i].born):
        while busy and busy[0][0] < values[index].born:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slots[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (values[index].dies, slots[index]))
    return slots


#: Where a gradient goes, given where the activation went.
BACK = {"down": "up", "up": "down", "same": "same"}


def direction(schedule: Schedule, stage: int) -> str:
    """Where a stage's output goes: `down` to the next rank (round to rank 0 from the last), `up`, or `same`."""
    ranks, (rank, _), (after, _) = schedule.ranks, schedule.placement[stage], schedule.placement[stage + 1]
    step = (after - rank) % ranks
    if step == 0:
        return "same"
    if ranks == 2:  # both neighbours are the same rank: round only where nothing else ever goes up
        return "down" if after > rank or schedule.placement == ring(ranks, schedule.chunks) else "up"
    return "down" if step == 1 else "up"


def message_edges(schedule: Schedule) -> dict[str, tuple[tuple[int, int], ...]]:
    """For each message column that anything ever uses, the (from, to) pairs of ranks."""
    pairs: dict[str, set[tuple[int, int]]] = {}
    for stage in range(schedule.stages - 1):
        where, rank, after = direction(schedule, stage), schedule.placement[stage][0], schedule.placement[stage + 1][0]
        there = pairs.setdefault(f"x_{where}", set())
        back = set() if schedule.phases == FORWARD else pairs.setdefault(f"g_{BACK[where]}", set())
        if where != "same":
            there.add((rank, after))
            back.add((after, rank))
    return {name: tuple(sorted(found)) for name, found in sorted(pairs.items())}
