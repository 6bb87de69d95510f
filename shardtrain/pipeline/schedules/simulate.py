"""A simulation of a schedule: its time, the idle time of its ranks, and the activations that they hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.buffers import allocate, message_edges
from shardtrain.pipeline.schedules.schedule import Action, Pipeline, PublishedOrder, Schedule, deadlock, needs


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one microbatch in *all* chunks of one rank, as in the papers; one chunk takes its share of them.

    Attributes:
      F: time of a forward.
      I: time of an input gradient.
      W: time of a weight gradient. A full backward B takes I + W.
      message: time of one message from one rank to another.
      waiting: share of a microbatch's activations that W still needs after I (M_W / M_B in the paper of ZB-H1).
    """

    F: float = 1.0
    I: float = 1.0
    W: float = 1.0
    message: float = 0.0
    waiting: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not (value := getattr(self, field.name)) >= 0:
                raise UserError(f"cost {field.name} is {value}; give a time (or share) of 0 or more")

    @property
    def B(self) -> float:
        """Time of a full backward."""
        return self.I + self.W

    def of(self, phase: str) -> float:
        """Time of a phase."""
        return {"F": self.F, "B": self.B, "I": self.I, "W": self.W}[phase]


@dataclasses.dataclass(frozen=True)
class Span:
    """An action with its rank and times.

    Attributes:
      rank: the rank.
      action: the action.
      start: when it starts.
      stop: when it ends.
    """

    rank: int
    action: Action
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Simulation:
    """The simulated costs of a schedule.

    Attributes:
      makespan: time from the first start to the last end.
      busy: time that each rank works.
      spans: every action with its times.
      peak_activations: on each rank, the most (chunk, microbatch) pairs that are past F and not past B (or I; those
        waiting for W count `Costs.waiting`). The unit is the activations of a chunk: divide by chunks for the papers'
        unit M.
      saved_inputs: on each rank, the most stage inputs stored at once, including those that arrived and wait for F.
    """

    makespan: float
    busy: tuple[float, ...]
    spans: tuple[Span, ...]
    peak_activations: tuple[float, ...]
    saved_inputs: tuple[int, ...]

    @property
    def bubble(self) -> tuple[float, ...]:
        """Time that each rank idles."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_fraction(self) -> float:
        """Idle time over all time, of all ranks."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0

    @property
    def stalls(self) -> tuple[float, ...]:
        """Time that each rank idles between its own first and last action."""
        own = [[span for span in self.spans if span.rank == rank] for rank in range(len(self.busy))]
        return tuple(
            max(span.stop for span in spans) - min(span.start for span in spans) - busy
            for spans, busy in zip(own, self.busy, strict=True)
        )


def simulate(
    pipeline: Schedule | PublishedOrder, costs: Costs | None = None, idle: Literal["compute", "skip"] = "compute"
) -> Simulation:
    """Simulate the time and memory of a schedule.

    Args:
      pipeline: a table, which runs in lockstep, or a published order, in which every rank continues as soon as it can.
      costs: by default all phases take the same time, and messages none.
      idle: for tables. `compute`: a phase takes its time if any rank has it (the others compute in vain, or wait).
        `skip`: a rank takes only the time of its own actions, and a tick starts when the slowest rank is there.

    Raises:
      UserError: the ranks of a published order wait for each other forever.
    """
    costs = costs or Costs()
    table = pipeline if isinstance(pipeline, Schedule) else pipeline.lockstep()
    spans = _events(pipeline, costs) if isinstance(pipeline, PublishedOrder) else _lockstep(pipeline, costs, idle)
    busy = [0.0] * pipeline.ranks
    for span in spans:
        busy[span.rank] += span.stop - span.start
    return Simulation(
        makespan=max(span.stop for span in spans) - min(span.start for span in spans),
        busy=tuple(busy),
        spans=tuple(spans),
        peak_activations=tuple(_peak(table, rank, costs.waiting) for rank in range(table.ranks)),
        saved_inputs=allocate(table).slots_by_rank["x"],
    )


def bubble_warning(schedule: Schedule) -> str | None:
    """Warn if there are so few microbatches that ranks idle for more than a quarter of the time; else return `None`.

    The idle time of a schedule does not depend on the number of microbatches. It is a quarter of the time with three
    times as many microbatches as would fit into it.
    """
    bubble, count = simulate(schedule).bubble_fraction, schedule.microbatches
    if bubble <= 0.25:
        return None
    enough = math.ceil(3 * count * bubble / (1 - bubble) - 1e-9)
    return (
        f"pipeline: with {count} microbatches on {schedule.ranks} ranks, {schedule.name} leaves ranks idle for "
        f"{bubble:.0%} of the time; for at most a quarter set pipeline.microbatches to {enough} or more, a divisor of "
        "the rows per device (a larger batch has more)"
    )


def _time(pipeline: Pipeline, costs: Costs) -> dict[str, float]:
    return {phase: costs.of(phase) / pipeline.chunks for phase in pipeline.phases}


def _lockstep(schedule: Schedule, costs: Costs, idle: str) -> list[Span]:
    """Run ticks one after the other; a tick in which a message arrives starts with the message."""
    time_K = np.array(list(_time(schedule, costs).values()))
    work_TRK = (schedule.table >= 0) * time_K
    if idle == "compute":
        work_TRK = np.broadcast_to(work_TRK.max(axis=1, keepdims=True), work_TRK.shape)
    arrives_T = np.zeros(schedule.ticks + 1, bool)
    if message_edges(schedule):
        for tick, rank, action in schedule.actions():
            stage = schedule.stage_RC[rank, action.chunk]
            arrives_T[tick + 1] |= action.phase != "W" and stage != (schedule.stages - 1 if action.phase == "F" else 0)
    length_T = work_TRK.sum(axis=2).max(axis=1) + costs.message * arrives_T[:-1]
    start_TRK = (np.cumsum(length_T) - length_T + costs.message * arrives_T[:-1])[:, None, None] + (
        np.cumsum(work_TRK, axis=2) - work_TRK
    )
    spans = []
    for tick, rank, action in schedule.actions():
        k = schedule.phases.index(action.phase)
        start = float(start_TRK[tick, rank, k])
        spans.append(Span(rank, action, start, start + float(time_K[k])))
    return spans


def _events(order: PublishedOrder, costs: Costs) -> list[Span]:
    """Run each rank's actions in order, each as soon as the messages it needs are there."""
    time = _time(order, costs)
    done: dict[tuple[str, int, int], float] = {}
    position, free = [0] * order.ranks, [0.0] * order.ranks
    spans: list[Span] = []
    while any(at < len(actions) for at, actions in zip(position, order.orders, strict=True)):
        before = len(spans)
        for rank, actions in enumerate(order.orders):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                needed = needs(order, rank, action)
                if not all(need in done for need in needed):
                    break
                ready = [done[need] + costs.message * (order.placement[need[1]][0] != rank) for need in needed]
                start = max([free[rank], *ready])
                free[rank] = start + time[action.phase]
                done[action.phase, int(order.stage_RC[rank, action.chunk]), action.microbatch] = free[rank]
                spans.append(Span(rank, action, start, free[rank]))
                position[rank] += 1
        if len(spans) == before:
            raise deadlock(order, position)
    return spans


def _peak(table: Schedule, rank: int, waiting: float) -> float:
    """Return the most activations that a rank holds: F adds one, B frees it; I frees all but `waiting`, W the rest."""
    change = {"F": 1.0, "B": -1.0, "I": waiting - 1.0, "W": -waiting}
    held = np.cumsum([change[action.phase] for _, each, action in table.actions() if each == rank])
    return float(held.max())


def spans_of(spans: Iterable[Span], rank: int) -> list[Span]:
    """Return the spans of a rank, in the order of their starts."""
    return sorted((span for span in spans if span.rank == rank), key=lambda span: span.start)
