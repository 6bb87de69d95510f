"""1F1B: each rank alternates one forward and one backward, so memory does not grow with microbatches.

PipeDream-Flush (Narayanan et al. 2020, arXiv:2006.09503).
"""

from __future__ import annotations

import numpy as np

from shardtrain.pipeline.schedules import interleaved
from shardtrain.pipeline.schedules.build import repeat, ring, tabulate
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import PublishedOrder, Schedule


def published_order(ranks: int, microbatches: int, chunks: int) -> PublishedOrder:
    """Make the published order: rank r fills the pipeline with R-1-r forwards, then alternates.

    Peak activations R-r.
    """
    if chunks > 1:
        return interleaved.published_order(ranks, microbatches, chunks)
    orders = tuple(
        repeat(microbatches, ("F0", fill), ("F0 B0", max(microbatches - fill, 0)), ("B0", fill))
        for fill in reversed(range(ranks))
    )
    return PublishedOrder("1f1b", ranks, microbatches, 1, ("F", "B"), ring(ranks), orders)


@register("1f1b", published_order=published_order)
def one_f_one_b(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Run one F and one B per tick; with several chunks, the schedule `interleaved`.

    Time `(M+R-1) (F+B)`; peak activations on rank r: 2(R-1-r)+1, the number of ticks until a microbatch comes back.
    """
    if chunks > 1:
        return interleaved.interleaved(ranks, microbatches, chunks)
    r, c, m = np.ogrid[:ranks, :1, :microbatches]
    return tabulate("1f1b", ring(ranks), {"F": m + r + c, "B": m + 2 * (ranks - 1) - r + c})
