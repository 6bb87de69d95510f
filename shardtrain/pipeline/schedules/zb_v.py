"""ZB-V: two chunks per rank that go down the ranks and come back up (Qi et al. 2023, arXiv:2401.10241, section 6).

Rank 0 holds the first and the last stage, so a microbatch's backward starts where its forward did, and all ranks hold
the same number of activations.
"""

from __future__ import annotations

import numpy as np

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.build import repeat, tabulate, vee, weights_last
from shardtrain.pipeline.schedules.registry import register
from shardtrain.pipeline.schedules.schedule import PublishedOrder, Schedule


def _two(ranks: int, chunks: int) -> None:
    if chunks != 2:
        raise UserError(
            f"zb_v has chunks {chunks}, but needs 2: a way down and a way back up; set chunks: 2 "
            f"({ranks} ranks x 2 chunks = {2 * ranks} stages)"
        )


def published_order(ranks: int, microbatches: int, chunks: int) -> PublishedOrder:
    """Make the published order: no bubble between a rank's first and last action if F = I = W.

    Peak activations: those of 2R chunks.

    Raises:
      UserError: `chunks` is not 2.
    """
    _two(ranks, chunks)
    enough = max(microbatches, 2 * ranks - 1)
    orders = tuple(
        repeat(
            microbatches,
            ("F0", 2 * (ranks - r) - 1),
            ("F1 F0", r),
            ("F1 I1 W1", ranks - r),
            ("F0 I0 W0 F1 I1 W1", enough - 2 * ranks + 1 + r),
            ("I0 W0 F1 I1 W1", ranks - 1 - r),
            ("I0 I1", r),
            ("I0 W0", ranks - r),
            ("W1", r),
            ("W0", r),
        )
        for r in range(ranks)
    )
    return PublishedOrder("zb_v", ranks, microbatches, 2, ("F", "I", "W"), vee(ranks), orders)


@register("zb_v", published_order=published_order, chunks=2)
def zb_v(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Start a microbatch every second tick, and run one stage per tick: down, up, and back the same way.

    A rank's two stages have different parity, so it does one F and one I per tick and never two.

    Time `(M+R-1) (F+I) + M W`. From F to I every rank holds the activations of 2R chunks at its peak, about half as
    many as rank 0 in the aligned 1F1B; about R more wait for W.

    Raises:
      UserError: `chunks` is not 2.
    """
    _two(ranks, chunks)
    r, c, m = np.ogrid[:ranks, :2, :microbatches]
    stages = 2 * ranks
    stage = np.where(c == 0, r, stages - 1 - r)
    forward = 2 * m + stage
    backward = 2 * m + (stages - 1) + (stages - 1 - stage)
    return tabulate("zb_v", vee(ranks), {"F": forward, "I": backward, "W": weights_last(backward)})
