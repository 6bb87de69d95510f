"""Embedding of tokens, which can also be the output head (tied), and of learned positions.

Shapes: B batch, S sequence, V vocabulary or number of positions, D model dim, P parts of the vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.host.typed import typed
from shardtrain.nn.matmul import added, einsum, gathered, scattered
from shardtrain.nn.param import Initializer, param
from shardtrain.sharding import constrain, shards
from shardtrain.weights.precision import Precision

_AXES = ("vocab", "embed")
_POSITIONS = ("positions", "embed")


class Embedding(nnx.Module):
    """A table `[vocab, embed]` that maps tokens to vectors and, with `attend`, vectors to logits.

    Args:
      vocab_size: rows of the table.
      dim: width of a vector.
      init: initialiser; default a normal with variance `1 / dim`.
      precision: dtypes.
      rngs: seeds of the weights.

    Example:
      >>> table = nn.Embedding(16, 4, rngs=nnx.Rngs(0))
      >>> x = table(jnp.array([[3, 1, 2]]))
      >>> x.shape, table.attend(x).shape
      ((1, 3, 4), (1, 3, 16))
    """

    @typed
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        init: Initializer | None = None,
        precision: Precision = Precision(),
        rngs: nnx.Rngs,
    ):
        self.axes, self.precision = _AXES, precision
        init = init or jax.nn.initializers.normal(dim**-0.5)
        self.weight = param(
            rngs.params(), (vocab_size, dim), _AXES, init, precision.params, "embedding", 1, precision.compute
        )

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        """Look up int tokens `[B, S]`; returns `[B, S, embed]` in the compute dtype."""
        return constrain(lookup(self.weight[...], tokens_BS, self.precision), "batch", "seq", None)

    def attend(self, x_BSD: jax.Array) -> jax.Array:
        """Multiply by the transposed table; returns logits `[B, S, vocab]` in the compute dtype."""
        return einsum("BSD,VD->BSV", x_BSD.astype(self.precision.compute), self.weight[...], _AXES, self.precision)


class PositionEmbedding(nnx.Module):
    """A learned vector for each position, `[positions, embed]` (GPT-2), to be added to those of the tokens.

    Args:
      max_len: number of positions, the length of the longest sequence.
      dim: width of a vector.
      precision: dtypes.
      rngs: seeds of the weights.

    Raises:
      UserError: `max_len` is below 1.

    Example:
      >>> table = nn.PositionEmbedding(16, 4, rngs=nnx.Rngs(0))
      >>> table(jnp.arange(5)[None]).shape
      (1, 5, 4)
    """

    @typed
    def __init__(self, max_len: int, dim: int, *, precision: Precision = Precision(), rngs: nnx.Rngs):
        if max_len < 1:
            raise UserError(f"a position table of {max_len} positions (max_len); use the longest sequence, 1 or more")
        self.max_len, self.precision = max_len, precision
        init = jax.nn.initializers.normal(0.02)  # Radford et al. 2019
        self.weight = param(
            rngs.params(), (max_len, dim), _POSITIONS, init, precision.params, "embedding", 1, precision.compute
        )

    def __call__(self, positions_BS: jax.Array) -> jax.Array:
        """Look up `batch["positions"]`, int `[B, S]`; returns `[B, S, embed]` in the compute dtype.

        Raises:
          UserError: the sequence is longer than the table. (In a shorter sequence, a position beyond the table takes
            the last vector; `make_train_step(debug=True)` refuses it.)
        """
        if positions_BS.shape[1] > self.max_len:
            raise UserError(
                f"the sequence has {positions_BS.shape[1]} positions, but the position table only {self.max_len} "
                f"(max_len); use sequences of {self.max_len} or fewer, or a larger max_len"
            )
        table_VD = self.weight[...]
        return constrain(lookup(table_VD, positions_BS, self.precision, _POSITIONS), "batch", "seq", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, tokens_BS: jax.Array, precision: Precision, axes: tuple[str, str] = _AXES) -> jax.Array:
    """Look up rows of a sharded table, `[B, S, D]`; the gradient is summed where the tokens are, then reduced once."""
    # The table is gathered over the batch's mesh axes before the lookup; otherwise XLA rematerialises all of it.
    table_VD = gathered(table_VD, axes, precision.compute)
    (V, D), parts = table_VD.shape, shards(axes[0])
    if parts == 1:
        return jnp.take(table_VD, tokens_BS, axis=0, mode="clip")
    # Each device looks in its own part of the vocabulary, and the parts are added. XLA would do the same, but aborts
    # (JAX 0.12) where a mesh axis is manual, so it is written out.
    table_PVD = constrain(table_VD.reshape(parts, V // parts, D), axes[0], None, None)
    first_P = jnp.arange(parts, dtype=tokens_BS.dtype) * (V // parts)
    local_PBS = jnp.clip(tokens_BS, 0, V - 1) - first_P[:, None, None]
    found_PBSD = jax.vmap(lambda table_VD, tokens_BS: table_VD.at[tokens_BS].get(mode="clip"))(table_PVD, local_PBS)
    here_PBS = (local_PBS >= 0) & (local_PBS < V // parts)
    found_PBSD = constrain(jnp.where(here_PBS[..., None], found_PBSD, 0), axes[0], "batch", "seq", None)
    return added(found_PBSD)


def _lookup_fwd(
    table_VD: jax.Array, tokens_BS: jax.Array, precision: Precision, axes: tuple[str, str] = _AXES
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup(table_VD, tokens_BS, precision, axes), (table_VD, tokens_BS)


def _lookup_bwd(
    precision: Precision, axes: tuple[str, str], saved: tuple[jax.Array, jax.Array], dy_BSD: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    table_VD, tokens_BS = saved
    (B, S), b, s = tokens_BS.shape, shards("batch"), shards("seq")

    def split(a: jax.Array) -> jax.Array:
        """Give each device's own rows and positions the dims 0 and 1."""
        a = a.reshape(b, B // b, s, S // s, *a.shape[2:]).swapaxes(1, 2)
        return constrain(a, "batch", "seq", *[None] * (a.ndim - 2))

    def add(tokens: jax.Array, dy: jax.Array) -> jax.Array:
        zeros_VD = jnp.zeros(table_VD.shape, precision.gradient)
        return zeros_VD.at[tokens].add(dy.astype(precision.gradient), mode="clip")

    # One table per device and their sum, written out: by itself, XLA gathers the activations instead where a mesh axis
    # is manual.
    sums = jax.vmap(jax.vmap(add))(split(tokens_BS), split(dy_BSD))
    dtable_VD = constrain(sums, "batch", "seq", axes[0], None).sum((0, 1))
    return scattered(dtable_VD, axes, table_VD.dtype), np.zeros(tokens_BS.shape, jax.dtypes.float0)


lookup.defvjp(_lookup_fwd, _lookup_bwd)
