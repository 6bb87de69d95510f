"""Token embedding, usable as the output head too (tied)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.nn.linear import einsum, gathered, scattered
from shardtrain.nn.param import param
from shardtrain.nn.precision import Precision
from shardtrain.sharding import constrain

_AXES = ("vocab", "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table_VD: jax.Array, tokens_BS: jax.Array, precision: Precision) -> jax.Array:
    # Gathered over the batch's mesh axes before the lookup: XLA otherwise rematerialises the whole table.
    return jnp.take(gathered(table_VD, _AXES, precision.compute), tokens_BS, axis=0, mode="clip")


def _lookup_fwd(
    table_VD: jax.Array, tokens_BS: jax.Array, precision: Precision
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lookup(table_VD, tokens_BS, precision), (table_VD, tokens_BS)


def _lookup_bwd(
    precision: Precision, saved: tuple[jax.Array, jax.Array], dy_BSD: jax.Array
) -> tuple[jax.Array, None]:
    # A frequent token sums up thousands of rows, which bfloat16 would stop counting at 256.
    table_VD, tokens_BS = saved
    wide_VD = jax.ShapeDtypeStruct(table_VD.shape, precision.gradient)
    rows = jax.linear_transpose(lambda t: jnp.take(t, tokens_BS, axis=0, mode="clip"), wide_VD)
    (dtable_VD,) = rows(dy_BSD.astype(precision.gradient))
    # Summed in the layout of the lookup: XLA otherwise moves dy to where the columns of the table are kept.
    return scattered(gathered(dtable_VD, _AXES, dtable_VD.dtype), _AXES, table_VD.dtype), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)


class Embedding(nnx.Module):
    """A table `[vocab, embed]`: tokens to vectors, and with `attend` vectors to logits."""

    def __init__(self, vocab_size: int, dim: int, *, precision: Precision = Precision(), rngs: nnx.Rngs):
        self.precision = precision
        init = jax.nn.initializers.normal(dim**-0.5)
        self.weight = param(rngs.params(), (vocab_size, dim), _AXES, init, precision.params, "embedding", inputs=1)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Look up int tokens `[B, S]`; returns `[B, S, embed]` in the compute dtype."""
        return constrain(_lookup(self.weight[...], tokens_BS, self.precision), "batch", "seq", None)

    def attend(self, x_BSD: jax.Array) -> jax.Array:
        """Logits `[B, S, vocab]` by the transposed table, in the compute dtype."""
        return einsum("BSD,VD->BSV", x_BSD.astype(self.precision.compute), self.weight[...], _AXES, self.precision)
