"""From a schedule to a program: the buffer slot of every action and message, by register allocation.

A value (a stage input, an output gradient, ...) is alive from the moment it is written to its last use. Values that are
alive at the same time get different slots. This is the colouring of an interval graph, which needs as many slots as the
most values that are ever alive at once. The executor then needs only a row of small integers per tick and rank.

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

#: Kinds of buffers: stage inputs, gradients of stage outputs, residuals of F, and operands of W.
KINDS = ("x", "g", "r", "w")

# Moments within a tick.
_ARRIVE, _F, _B, _W, _MOMENTS = 0, 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive ticks that the executor runs as one loop.

    Attributes:
      start: the first tick.
      stop: the tick after the last.
      phases: the phases that some rank runs in these ticks.
      messages: the columns (`x_down`, `g_up`, ...) in which any message arrives in these ticks.
      first: the phases that some rank runs on the first stage.
      last: the phases that some rank runs on the last stage.
    """

    start: int
    stop: int
    phases: tuple[str, ...]
    messages: tuple[str, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A schedule with its buffers: everything that the executor needs.

    Attributes:
      schedule: the schedule.
      columns: int32 `[ticks, ranks]` each, -1 for none. Only those exist that the schedule and the options need.

        ==================== =========================================================================================
        F, B or I, W         the action: `chunk * microbatches + microbatch`
        x_down, x_up, x_same slot for the stage input that arrives as the tick starts: from the rank before, the rank
                             after, or this rank itself
        g_down, g_up, g_same the same for a gradient
        F_x                  slot of the stage input; on the first stage, the slot to store it in, if it is used again
        F_r, F_g             slots to store residuals in; on the last stage, also the gradient of the loss
        B_x, B_r, B_g        slots of the values that B uses; no B_g on the last stage if B computes the loss itself
        I_x, I_r, I_g        the same, for a split backward
        I_w, W_w             slot where I stores, and W reads, the operands of W
        ==================== =========================================================================================
      slots: number of slots of each kind in `KINDS`, the most that any rank needs. (The executor adds a slot that is
        never read, to which idle ranks write.)
      slots_by_rank: number of slots that each rank needs, by kind.
      edges: for each message column, the (from, to) pairs of ranks that its permute joins: an open chain, unless the
        placement is a ring of several chunks. Empty for `x_same` and `g_same`, where a rank keeps its own.
    """

    schedule: Schedule
    columns: Mapping[str, np.ndarray]
    slots: Mapping[str, int]
    slots_by_rank: Mapping[str, tuple[int, ...]]
    edges: Mapping[str, tuple[tuple[int, int], ...]]

    def segments(self) -> list[Segment]:
        """Split all ticks into segments, in each of which the same phases are active on some rank."""
        active_TK = np.any(self.schedule.table >= 0, axis=1)
        cuts = [0, *(1 + np.flatnonzero((active_TK[1:] != active_TK[:-1]).any(axis=1))).tolist(), len(active_TK)]
        return [self.segment(start, stop) for start, stop in itertools.pairwise(cuts)]

    def segment(self, start: int, stop: int) -> Segment:
        """Describe the ticks from `start` to `stop` (exclusive) as one segment."""
        schedule, ticks = self.schedule, range(start, stop)
        phases = tuple(phase for phase in schedule.phases if (self.columns[phase][start:stop] >= 0).any())
        messages = tuple(name for name in self.edges if (self.columns[name][start:stop] >= 0).any())
        first, last = (
            tuple(phase for phase in phases if np.isin(schedule.when(phase)[stage], ticks).any()) for stage in (0, -1)
        )
        return Segment(start, stop, phases, messages, first, last)


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value in a slot of a rank, alive from `born` to `dies` (moments), and the columns that name the slot."""

    kind: str
    rank: int
    born: int
    dies: int
    columns: tuple[tuple[str, int], ...]  # (column, tick)


def allocate(schedule: Schedule, *, save_residuals: bool = False) -> Program:
    """Give every value a slot.

    Args:
      schedule: is checked first.
      save_residuals: whether the backward uses residuals that F stored, instead of computing F again from the stage
        input.

    Raises:
      UserError: the schedule is not valid.
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
    """Yield the input of every stage but the first, for every microbatch, if it is not needed after F."""
    when = schedule.when("F").tolist()
    for stage, (rank, _) in enumerate(schedule.placement[1:], 1):
        for before, tick in zip(when[stage - 1], when[stage], strict=True):
            columns = ((f"x_{direction(schedule, stage - 1)}", before + 1), ("F_x", tick))
            yield _Value("x", rank, _MOMENTS * (before + 1) + _ARRIVE, _MOMENTS * tick + _F, columns)


def _values(schedule: Schedule, stored: str) -> Iterator[_Value]:
    """Yield every value of every stage and microbatch. `stored` is the kind (x or r) that the backward starts from."""
    b, split = schedule.phases[1], "W" in schedule.phases
    when = {phase: schedule.when(phase).tolist() for phase in schedule.phases}
    last = schedule.stages - 1
    if stored == "r":
        yield from _inputs(schedule)
    for stage, (rank, _) in enumerate(schedule.placement):
        for m in range(schedule.microbatches):
            tf, tb = when["F"][stage][m], when[b][stage][m]
            f, back = _MOMENTS * tf + _F, _MOMENTS * tb + _B
            arrival = () if stage == 0 else ((f"x_{direction(schedule, stage - 1)}", when["F"][stage - 1][m] + 1),)
            born = _MOMENTS * arrival[0][1] + _ARRIVE if arrival else f
            if stored == "x":
                yield _Value("x", rank, born, back, (*arrival, ("F_x", tf), (f"{b}_x", tb)))
            else:
                yield _Value("r", rank, f, back, (("F_r", tf), (f"{b}_r", tb)))
            if stage < last:
                tick = when[b][stage + 1][m] + 1
                arrival = ((f"g_{BACK[direction(schedule, stage)]}", tick),)
                yield _Value("g", rank, _MOMENTS * tick + _ARRIVE, back, (*arrival, (f"{b}_g", tb)))
            elif stored == "r":
                yield _Value("g", rank, f, back, (("F_g", tf), (f"{b}_g", tb)))
            if split:
                tw = when["W"][stage][m]
                yield _Value("w", rank, back, _MOMENTS * tw + _W, (("I_w", tb), ("W_w", tw)))


def _colour(values: list[_Value]) -> list[int]:
    """Return a slot for each value, always the lowest that is free."""
    slots = [0] * len(values)
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (dies, slot)
    for index in sorted(range(len(values)), key=lambda i: values[i].born):
        while busy and busy[0][0] < values[index].born:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slots[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (values[index].dies, slots[index]))
    return slots


#: The direction of a gradient, given that of the activation.
BACK = {"down": "up", "up": "down", "same": "same"}


def direction(schedule: Schedule, stage: int) -> str:
    """Return where a stage's output goes: `down` to the next rank (from the last to rank 0), `up`, or `same`."""
    ranks, (rank, _), (after, _) = schedule.ranks, schedule.placement[stage], schedule.placement[stage + 1]
    step = (after - rank) % ranks
    if step == 0:
        return "same"
    if ranks == 2:  # both neighbours are the same rank: down only in a ring
        return "down" if after > rank or schedule.placement == ring(ranks, schedule.chunks) else "up"
    return "down" if step == 1 else "up"


def message_edges(schedule: Schedule) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the (from, to) pairs of ranks for each message column that is ever used."""
    pairs: dict[str, set[tuple[int, int]]] = {}
    for stage in range(schedule.stages - 1):
        where, rank, after = direction(schedule, stage), schedule.placement[stage][0], schedule.placement[stage + 1][0]
        there = pairs.setdefault(f"x_{where}", set())
        back = set() if schedule.phases == FORWARD else pairs.setdefault(f"g_{BACK[where]}", set())
        if where != "same":
            there.add((rank, after))
            back.add((after, rank))
    return {name: tuple(sorted(found)) for name, found in sorted(pairs.items())}
