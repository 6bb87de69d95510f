"""GPipe: all forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965).

With several chunks it is the breadth-first schedule (Lamy-Poirier 2022, arXiv:2211.05953): all microbatches through the
first chunk, then all through the next, which divides the bubble by the number of chunks.
"""

from __future__ import annotations

import numpy as np

from shardtrain.pipeline.schedules.build import ring, tabulate
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import Action, PublishedOrder, Schedule


def published_order(ranks: int, microbatches: int, chunks: int) -> PublishedOrder:
    """Make the published order: the backward starts with the last microbatch."""
    forward = tuple(Action("F", chunk, m) for chunk in range(chunks) for m in range(microbatches))
    order = forward + tuple(Action("B", action.chunk, action.microbatch) for action in reversed(forward))
    return PublishedOrder("gpipe", ranks, microbatches, chunks, ("F", "B"), ring(ranks, chunks), (order,) * ranks)


@register("gpipe", published_order=published_order)
def gpipe(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Run all F, then all B, both from microbatch 0 on, so that gradients are summed in the same order as elsewhere.

    Time `(M + (R-1)/C) (F+B)` for M >= R; peak activations: all of them.
    """
    r, c, m = np.ogrid[:ranks, :chunks, :microbatches]
    stride = max(microbatches, ranks)  # a microbatch is back on rank 0 after `ranks` ticks at the earliest
    forward = r + c * stride + m
    backward = forward.max() + 1 + (ranks - 1 - r) + (chunks - 1 - c) * stride + m
    return tabulate("gpipe", ring(ranks, chunks), {"F": forward, "B": backward})
