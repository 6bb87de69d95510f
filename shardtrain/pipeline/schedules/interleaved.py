"""Interleaved 1F1B: several chunks per rank divide the bubble (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

The paper sends microbatches in groups of R (ranks): a group through the first chunk, then through the next, ... There M
must be a multiple of R. Here any M works: M // R groups of R microbatches or a few more, as equal as possible. A larger
group loses no time and holds a few more activations. With M < R there is one group, with idle ticks that cannot be
filled, because a microbatch needs R ticks to come back to the rank where it started.
"""

from __future__ import annotations

import itertools

import numpy as np

from shardtrain.pipeline.schedules.build import ring, tabulate
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import Action, PublishedOrder, Schedule


def groups(ranks: int, microbatches: int) -> list[range]:
    """Split the microbatches into groups of at least `ranks` (or one smaller group, if there are fewer)."""
    count = max(microbatches // ranks, 1)
    edges = [-(-microbatches * group // count) for group in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def ticks(ranks: int, microbatches: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ticks of F and B, int `[ranks, chunks, microbatches]`; every message is used when it arrives.

    A rank's n-th forward is n ticks after rank 0's first, plus one tick per rank. The backward is its mirror image. It
    starts in the tick of the last stage's first forward (or, with unequal groups, when no group's starts too early).
    """
    r, c, _ = np.ogrid[:ranks, :chunks, :1]
    by_size = [
        (group.start, max(len(group), ranks), i) for group in groups(ranks, microbatches) for i in range(len(group))
    ]
    start, size, i = np.array(by_size).T
    forward = r + chunks * start + c * size + i
    first = (chunks - 1) * size.max() + ranks - 1
    backward = first + (ranks - 1 - r) + chunks * start + (chunks - 1 - c) * size + i
    return forward, backward


def published_order(ranks: int, microbatches: int, chunks: int) -> PublishedOrder:
    """Make the published order, which Megatron-LM runs. Peak activations on rank r: those of (C+1)R-1-2r chunks."""
    together = groups(ranks, microbatches)
    forward = [Action("F", c, m) for group in together for c in range(chunks) for m in group]
    backward = [Action("B", c, m) for group in together for c in reversed(range(chunks)) for m in group]
    orders = []
    for rank in range(ranks):
        fill = min((chunks - 1) * max(map(len, together)) + 2 * (ranks - 1 - rank), len(forward))
        steady = [action for pair in zip(forward[fill:], backward, strict=False) for action in pair]
        orders.append((*forward[:fill], *steady, *backward[len(forward) - fill :]))
    return PublishedOrder("interleaved", ranks, microbatches, chunks, ("F", "B"), ring(ranks, chunks), tuple(orders))


@register("interleaved", published_order=published_order, chunks=2)
def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Run one F and one B per tick.

    Time `(M + (R-1)/C) (F+B)` for M >= R; peak activations as published.
    """
    forward, backward = ticks(ranks, microbatches, chunks)
    return tabulate("interleaved", ring(ranks, chunks), {"F": forward, "B": backward})
