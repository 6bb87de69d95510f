"""Interleaved 1F1B: several chunks per rank divide the bubble (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

The paper sends microbatches in groups of R (ranks): a group through the first chunk, then through the next, ... It
needs M to be a multiple of R. Here any M works: M // R groups of R microbatches or a few more, as equal as possible. A
larger group loses no time and holds a few more activations. With M < R there is one group, and holes in it: nothing can
fill them, as a microbatch needs R ticks to come back to the rank where it started.
"""

from __future__ import annotations

import itertools

import numpy as np

from shardtrain.pipeline.schedules.build import ring, tabulate
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import Action, Schedule, Textbook


def groups(ranks: int, microbatches: int) -> list[range]:
    """The microbatches, in groups of at least `ranks` (or one smaller group, if there are fewer)."""
    count = max(microbatches // ranks, 1)
    edges = [-(-microbatches * group // count) for group in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def ticks(ranks: int, microbatches: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """The ticks of F and B, int `[ranks, chunks, microbatches]`, in which every message is used when it arrives.

    A rank's n-th forward is n ticks after rank 0's first plus one tick per rank; the backward is its mirror image,
    started in the tick in which the last stage has done its first (or, with unequal groups, no group's too early).
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


def textbook(ranks: int, microbatches: int, chunks: int) -> Textbook:
    """As published (and as Megatron-LM runs it). Peak activations on rank r: (C+1)R-1-2r chunks' worth."""
    together = groups(ranks, microbatches)
    forward = [Action("F", c, m) for group in together for c in range(chunks) for m in group]
    backward = [Action("B", c, m) for group in together for c in reversed(range(chunks)) for m in group]
    orders = []
    for rank in range(ranks):
        fill = min((chunks - 1) * max(map(len, together)) + 2 * (ranks - 1 - rank), len(forward))
        steady = [action for pair in zip(forward[fill:], backward, strict=False) for action in pair]
        orders.append((*forward[:fill], *steady, *backward[len(forward) - fill :]))
    return Textbook("interleaved", ranks, microbatches, chunks, ("F", "B"), ring(ranks, chunks), tuple(orders))


@register("interleaved", textbook=textbook, chunks=2)
def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """One F and one B per tick. Time `(M + (R-1)/C) (F+B)` for M >= R; peak activations as published."""
    forward, backward = ticks(ranks, microbatches, chunks)
    return tabulate("interleaved", ring(ranks, chunks), {"F": forward, "B": backward})
