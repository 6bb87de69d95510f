"""Tools to make schedules: placements of stages, tables from ticks, orders from patterns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.schedule import Action, Placement, Schedule


def ring(ranks: int, chunks: int = 1) -> Placement:
    """Place stage s of `ranks * chunks` stages on rank `s % ranks`, chunk `s // ranks`."""
    return tuple((stage % ranks, stage // ranks) for stage in range(ranks * chunks))


def vee(ranks: int) -> Placement:
    """Place two chunks in a V: stages go down the `ranks` and back up, so rank 0 holds the first and the last."""
    return tuple((rank, 0) for rank in range(ranks)) + tuple((rank, 1) for rank in reversed(range(ranks)))


def tabulate(name: str, placement: Placement, ticks: Mapping[str, np.ndarray]) -> Schedule:
    """Make the table in which every action runs in a given tick.

    Args:
      name: of the schedule.
      placement: of the stages.
      ticks: for each phase, in order, int `[ranks, chunks, microbatches]`.

    Raises:
      UserError: ticks differ in shape, are negative or not integers, or a rank would do two actions at once.
    """
    _check_ticks(name, ticks)
    ranks, chunks, microbatches = next(iter(ticks.values())).shape
    rank_RCM, chunk_RCM, microbatch_RCM = np.indices((ranks, chunks, microbatches))
    table = np.full((max(tick.max() for tick in ticks.values()) + 1, ranks, len(ticks)), -1)
    for phase, tick_RCM in enumerate(ticks.values()):
        table[tick_RCM, rank_RCM, phase] = chunk_RCM * microbatches + microbatch_RCM
        if (table[:, :, phase] >= 0).sum() < tick_RCM.size:
            raise UserError(
                f"schedule {name} has two {list(ticks)[phase]} on a rank in one tick; move one to another tick"
            )
    return Schedule(name, ranks, microbatches, chunks, tuple(ticks), placement, table)


def _check_ticks(name: str, ticks: Mapping[str, np.ndarray]) -> None:
    shapes = {phase: np.shape(tick) for phase, tick in ticks.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 3:
        raise UserError(
            f"schedule {name} has ticks of the shapes {shapes}; give each phase one of [ranks, chunks, microbatches] "
            "(np.broadcast_to, where a formula does not depend on all three)"
        )
    for phase, tick in ticks.items():
        if not np.issubdtype(tick.dtype, np.integer) or not tick.size or tick.min() < 0:
            raise UserError(
                f"schedule {name} has ticks of {phase} that are not integers of 0 or more; count ticks from 0"
            )


def weights_last(tick_RCM: np.ndarray) -> np.ndarray:
    """Return ticks for W: the last `chunks * microbatches`, on each rank in the order of its I.

    No rank waits for another's W only if all ranks do W in the same ticks, as few as there are actions on a rank. The
    last ticks always work: a rank's n-th I from the end is at least n ticks before the end.

    Args:
      tick_RCM: the ticks of I, int `[ranks, chunks, microbatches]`.
    """
    ranks, chunks, microbatches = tick_RCM.shape
    place_RCM = tick_RCM.reshape(ranks, -1).argsort(axis=1).argsort(axis=1).reshape(tick_RCM.shape)
    return tick_RCM.max() + 1 - chunks * microbatches + place_RCM


def repeat(microbatches: int, *patterns: tuple[str, int]) -> tuple[Action, ...]:
    """Repeat patterns of actions.

    Each phase of a chunk counts its own microbatches up from 0; those beyond the last are left out.

    Args:
      microbatches: per step.
      *patterns: such as `("F0 B1", 3)`: forward through chunk 0, then backward through chunk 1, three times.
    """
    count: dict[str, int] = {}
    actions = []
    for pattern, times in patterns:
        for token in pattern.split() * times:
            count[token] = count.get(token, -1) + 1
            actions.append(Action(token[0], int(token[1:]), count[token]))
    return tuple(action for action in actions if action.microbatch < microbatches)
