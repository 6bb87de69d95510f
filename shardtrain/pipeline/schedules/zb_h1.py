"""ZB-H1: 1F1B with a split backward, so that weight gradients can wait (Qi et al. 2023, arXiv:2401.10241).

I computes the input gradient, for which the previous stage waits; W the weight gradient, for which no stage waits.
"""

from __future__ import annotations

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules import interleaved
from shardtrain.pipeline.schedules.build import repeat, ring, tabulate, weights_last
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import PublishedOrder, Schedule


def published_order(ranks: int, microbatches: int, chunks: int) -> PublishedOrder:
    """Make the published order, in which rank r keeps r weight gradients waiting. Bubble (R-1)(F+I-W).

    Raises:
      UserError: there are several chunks, which the paper does not have.
    """
    if chunks != 1:
        raise UserError(f"zb_h1 with chunks {chunks} was never published; its published form needs chunks 1")
    enough = max(microbatches, ranks)
    orders = tuple(
        repeat(
            microbatches,
            ("F0", ranks - 1 - r),
            ("F0 I0", r),
            ("F0 I0 W0", enough - ranks + 1),
            ("I0 W0", ranks - 1 - r),
            ("W0", r),
        )
        for r in range(ranks)
    )
    return PublishedOrder("zb_h1", ranks, microbatches, 1, ("F", "I", "W"), ring(ranks), orders)


@register("zb_h1", published_order=published_order)
def zb_h1(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Run one F, one I and one W per tick; with several chunks, the interleaved schedule, split likewise.

    Time `(M + (R-1)/C) (F+I) + M W` for M >= R: in lockstep W cannot fill the bubble, but does not enlarge it either.
    """
    forward, backward = interleaved.ticks(ranks, microbatches, chunks)
    ticks = {"F": forward, "I": backward, "W": weights_last(backward)}
    return tabulate("zb_h1", ring(ranks, chunks), ticks)
