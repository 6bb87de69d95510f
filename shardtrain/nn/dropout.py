"""Dropout with a mask that depends on the row, never on where the row is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.nn.context import Context


class Dropout(nnx.Module):
    """Zero each element with probability `rate` and scale the others by `1 / (1 - rate)`; do nothing in evaluation.

    Args:
      rate: a probability in [0, 1).
      site: name of this place within its block; two dropouts of a block need different names.

    Raises:
      UserError: the rate is outside [0, 1).

    Example:
      >>> drop, ctx = nn.Dropout(0.5, site="mlp"), nn.Context({"row": jnp.arange(2)}, jax.random.key(0), train=True)
      >>> sorted(set(drop(jnp.ones((2, 64)), ctx).ravel().tolist()))
      [0.0, 2.0]
    """

    def __init__(self, rate: float, site: str):
        if not 0 <= rate < 1:
            raise UserError(f"dropout {rate} is not a probability below 1; use 0 <= dropout < 1")
        self.rate, self.site = rate, site

    def __call__(self, x_B: jax.Array, ctx: Context) -> jax.Array:
        """Drop elements of `x_B`, `[B, ...]` in any dtype."""
        if not ctx.train or self.rate == 0:
            return x_B
        keep = 1 - self.rate
        mask_B = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x_B.shape[1:]))(ctx.row_keys(self.site))
        return jnp.where(mask_B, x_B / jnp.asarray(keep, x_B.dtype), jnp.zeros((), x_B.dtype))
