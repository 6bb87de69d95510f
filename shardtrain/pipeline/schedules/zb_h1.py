"""ZB-H1: 1F1B whose backward is split, so that weight gradients can wait (Qi et al. 2023, arXiv:2401.10241).

I computes the input gradient, which the previous stage waits for; W the weight gradient, which nobody waits for.
"""

from __future__ import annotations

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules import interleaved
from shardtrain.pipeline.schedules.build import repeat, ring, tabulate, weights_last
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import Schedule, Textbook


def textbook(ranks: int, microbatches: int, chunks: int) -> Textbook:
    """As published: rank r keeps r weight gradients waiting. Bubble (R-1)(F+I-W).

    Raises:
      UserError: several chunks, which the paper does not have.
    """
    if chunks != 1:
        raise UserError(f"zb_h1 with chunks {chunks} was never published; its textbook form needs chunks 1")
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
    return Textbook("zb_h1", ranks, microbatches, 1, ("F", "I", "W"), ring(ranks), orders)


@register("zb_h1", textbook=textbook)
def zb_h1(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """One F, one I and one W per tick; with several chunks, the same split of the interleaved schedule.

    Time `(M + (R-1)/C) (F+I) + M W` for M >= R: in lockstep W cannot fill the bubble, but it no longer makes one.
    """
    forward, backward = interleaved.ticks(ranks, microbatches, chunks)
    ticks = {"F": forward, "I": backward, "W": weights_last(backward)}
    return tabulate("zb_h1", ring(ranks, chunks), ticks)
