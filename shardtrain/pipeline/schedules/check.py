"""The check of a schedule: sizes, placement, each action exactly once, and no action before its inputs are there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.schedule import FORWARD, PHASES, Action, Schedule


def check(schedule: Schedule) -> None:
    """Refuse a schedule that would compute wrong gradients, or none.

    A table has one cell per tick, rank and phase, so that a rank does one action at a time needs no check.

    Raises:
      UserError: the schedule is not valid; names the first mistake with tick, rank and action.
    """
    _sizes(schedule)
    _placement(schedule)
    _exactly_once(schedule)
    _order(schedule)


def check_trains(schedule: Schedule) -> None:
    """Refuse a schedule without a backward pass.

    Raises:
      UserError: the schedule has only forward passes.
    """
    if schedule.phases == FORWARD:
        raise UserError(f"schedule {schedule.name} goes forward only, which trains nothing; use phases {PHASES}")


def _sizes(schedule: Schedule) -> None:
    name, table = schedule.name, schedule.table
    if schedule.phases not in (*PHASES, FORWARD):
        raise UserError(f"schedule {name} has phases {schedule.phases}; use one of {PHASES}")
    if table.ndim != 3 or table.shape[1:] != (schedule.ranks, len(schedule.phases)):
        raise UserError(
            f"schedule {name} has a table of shape {table.shape}; it must be [ticks, ranks, phases], "
            f"here [any, {schedule.ranks}, {len(schedule.phases)}]"
        )
    items = schedule.chunks * schedule.microbatches
    for tick, rank, phase in np.argwhere((table < -1) | (table >= items)):
        raise UserError(
            f"schedule {name}, tick {tick}, rank {rank}, phase {schedule.phases[phase]}: {table[tick, rank, phase]} is "
            f"not an action; with {schedule.chunks} chunks x {schedule.microbatches} microbatches = {items} actions, "
            f"write -1 (idle) to {items - 1} (chunk * {schedule.microbatches} + microbatch)"
        )


def _placement(schedule: Schedule) -> None:
    name, ranks, placement = schedule.name, schedule.ranks, schedule.placement
    wanted = {(rank, chunk) for rank in range(ranks) for chunk in range(schedule.chunks)}
    if len(placement) != len(wanted) or set(placement) != wanted:
        raise UserError(
            f"schedule {name} places its {len(placement)} stages on {sorted(set(placement))}; each of the "
            f"{ranks} ranks x {schedule.chunks} chunks = {len(wanted)} (rank, chunk) must hold one stage"
        )
    for stage, ((rank, _), (after, _)) in enumerate(itertools.pairwise(placement)):
        if (after - rank) % ranks not in {0, 1, ranks - 1}:
            raise UserError(
                f"schedule {name} places stage {stage} on rank {rank} and stage {stage + 1} on rank {after}; messages "
                f"go to the same rank or a neighbour of it ({(rank - 1) % ranks} or {(rank + 1) % ranks})"
            )


def _exactly_once(schedule: Schedule) -> None:
    seen: dict[tuple[int, Action], int] = {}
    for tick, rank, action in schedule.actions():
        if (rank, action) in seen:
            raise UserError(
                f"schedule {schedule.name}, tick {tick}, rank {rank}: {schedule.describe(rank, action)} was "
                f"done in tick {seen[rank, action]} already; do each action once"
            )
        seen[rank, action] = tick
    for rank, action in _all(schedule):
        if (rank, action) not in seen:
            raise UserError(
                f"schedule {schedule.name}, rank {rank}: {schedule.describe(rank, action)} is in no tick; "
                "do each action once"
            )


def _all(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    for rank in range(schedule.ranks):
        for phase in schedule.phases:
            for chunk in range(schedule.chunks):
                for microbatch in range(schedule.microbatches):
                    yield rank, Action(phase, chunk, microbatch)


def _order(schedule: Schedule) -> None:
    """Check that inputs come first: those of another stage in an earlier tick, those of the own stage in this tick.

    In one tick the phases run in order, and every phase comes after those of its own stage that it needs.
    """
    when_SM = {phase: schedule.when(phase) for phase in schedule.phases}
    forward_SM = when_SM["F"]
    _after(schedule, "F", forward_SM[1:], 1, "F", forward_SM[:-1], 1, -1)
    if schedule.phases == FORWARD:
        return
    backward = schedule.phases[1]
    backward_SM = when_SM[backward]
    _after(schedule, backward, backward_SM, 0, "F", forward_SM, 0, 0)
    _after(schedule, backward, backward_SM[:-1], 0, backward, backward_SM[1:], 1, +1)
    if "W" in when_SM:
        _after(schedule, "W", when_SM["W"], 0, "I", backward_SM, 0, 0)


def _after(
    schedule: Schedule,
    phase: str,
    when_SM: np.ndarray,
    first_stage: int,
    needed: str,
    needed_SM: np.ndarray,
    latency: int,
    offset: int,
) -> None:
    """Check that `phase` of each stage is at least `latency` ticks after `needed` of the stage `offset` further on."""
    for row, microbatch in np.argwhere(when_SM < needed_SM + latency):
        stage = row + first_stage
        (rank, chunk), (other, other_chunk) = schedule.placement[stage], schedule.placement[stage + offset]
        raise UserError(
            f"schedule {schedule.name}, tick {when_SM[row, microbatch]}, rank {rank}: "
            f"{schedule.describe(rank, Action(phase, chunk, microbatch))} comes too early; it needs "
            f"{schedule.describe(other, Action(needed, other_chunk, microbatch))} on rank {other}, done in tick "
            f"{needed_SM[row, microbatch]}, so move it to tick {needed_SM[row, microbatch] + latency} or later"
        )
