"""An exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.errors import UserError

Tree = Any


def check_decay(decay: float | None) -> None:
    """Refuse the decay of an average that is not from 0 to below 1."""
    if decay is not None and not 0 <= decay < 1:
        raise UserError("ema.decay", decay, "must be from 0 to below 1", "for example 0.999, or null for no average")


def next_ema(ema: Tree, params: Tree, step: jax.Array, decay: float) -> Tree:
    """Return the average after a step: `d * ema + (1 - d) * params`, with `d = min(decay, (1 + t) / (10 + t))`.

    Args:
      ema: the average before.
      params: the weights that train, after the step.
      step: t, the number of steps before.
      decay: the largest share of the old average. The other bound lets the average forget the first steps sooner.
    """

    def one(e: jax.Array, p: jax.Array) -> jax.Array:
        t = step.astype(e.dtype)
        share = jnp.minimum(decay, (1 + t) / (10 + t))
        return e + (1 - share) * (p.astype(e.dtype) - e)

    return jax.tree.map(one, ema, params)
