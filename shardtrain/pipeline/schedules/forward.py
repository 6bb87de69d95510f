"""Forward passes alone, for evaluation and generation: a table of F for the placement of any schedule."""

from __future__ import annotations

import itertools

import numpy as np

from shardtrain.pipeline.schedules.build import tabulate
from shardtrain.pipeline.schedules.schedule import Schedule


def forward(schedule: Schedule, microbatches: int | None = None) -> Schedule:
    """Make a schedule of forward passes alone, through the same stages on the same ranks.

    A microbatch never waits between stages, so a rank holds one stage input whatever the number of microbatches. Each
    starts as soon as it can without ever meeting another on a rank. Ticks, for R ranks, C chunks and M microbatches: in
    a ring `C M + R - 1`, the minimum, if M is a multiple of R or C is 1, else `(C - 1) (-M mod R)` more; in a V
    `2 M + 2 (R - 1)`, also the minimum.

    Args:
      schedule: the schedule whose placement to use.
      microbatches: per step; those of `schedule` by default.
    """
    count = schedule.microbatches if microbatches is None else microbatches
    ticks_RCM = np.add.outer(schedule.stage_RC, _starts(schedule, count))
    return tabulate(f"{schedule.name}, forward", schedule.placement, {"F": ticks_RCM})


def _starts(schedule: Schedule, count: int) -> list[int]:
    """Return the tick in which each microbatch enters the first stage."""
    # Two microbatches meet where a rank holds two stages as far apart as their starts.
    apart = {b - a for stages in schedule.stage_RC.tolist() for a, b in itertools.combinations(sorted(stages), 2)}
    starts: list[int] = []
    taken: set[int] = set()
    tick = 0
    while len(starts) < count:
        if tick not in taken:
            starts.append(tick)
            taken |= {tick + distance for distance in apart}
        tick += 1
    return starts
