"""1F1B: each rank alternates one forward and one backward, so memory does not grow with microbatches.

PipeDream-Flush (Narayanan et al. 2020, arXiv:2006.09503).
"""

from __future__ import annotations

import numpy as np

from shardtrain.pipeline.schedules import interleaved
from shardtrain.pipeline.schedules.build import repeat, ring, tabulate
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import Schedule, Textbook


def textbook(ranks: int, microbatches: int, chunks: int) -> Textbook:
    """As published: rank r fills the pipeline with R-1-r forwards, then alternates. Peak activations R-r."""
    if chunks > 1:
        return interleaved.textbook(ranks, microbatches, chunks)
    orders = tuple(
        repeat(microbatches, ("F0", fill), ("F0 B0", max(microbatches - fill, 0)), ("B0", fill))
        for fill in reversed(range(ranks))
    )
    return Textbook("1f1b", ranks, microbatches, 1, ("F", "B"), ring(ranks), orders)


@register("1f1b", textbook=textbook)
def one_f_one_b(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """One F and one B per tick; with several chunks it is the schedule `interleaved`.

    Time `(M+R-1) (F+B)`; peak activations on rank r: 2(R-1-r)+1, since a microbatch comes back after as many ticks.
    """
    if chunks > 1:
        return interleaved.interleaved(ranks, microbatches, chunks)
    r, c, m = np.ogrid[:ranks, :1, :microbatches]
    return tabulate("1f1b", ring(ranks), {"F": m + r + c, "B": m + 2 * (ranks - 1) - r + c})
