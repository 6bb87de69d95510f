"""Cross entropy over a vocabulary that may be sharded, as sums and weights.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from shardtrain.errors import UserError
from shardtrain.nn.precision import at_least_float32
from shardtrain.sharding import constrain

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Loss = tuple[jax.Array, jax.Array, Metrics]


def cross_entropy(logits_BSV: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array, *, z_loss: float = 0.0) -> Loss:
    """Summed cross entropy in nats, its weight, and metrics, in at least float32.

    The logits are only ever reduced over the vocabulary, never indexed: with a sharded vocabulary each device sends
    three numbers per token instead of its logits.

    Args:
      targets_BS: int labels below V.
      mask_BS: weight of each token, 0 to ignore it.
      z_loss: coefficient on `logsumexp^2` (Chowdhery et al. 2022, section 5), part of the loss sum.

    Returns:
      Scalars `loss_sum` and `weight_sum`, and `{"cross_entropy": (sum, weight)}` without the z-loss.
    """
    dtype = at_least_float32(logits_BSV.dtype)
    logits_BSV = constrain(logits_BSV, "batch", "seq", "vocab").astype(dtype)
    mask_BS = mask_BS.astype(dtype)
    top_BS = jax.lax.stop_gradient(logits_BSV.max(-1))
    log_z_BS = top_BS + jnp.log(jnp.exp(logits_BSV - top_BS[..., None]).sum(-1))
    is_target_BSV = jax.lax.broadcasted_iota(targets_BS.dtype, logits_BSV.shape, 2) == targets_BS[..., None]
    target_BS = jnp.where(is_target_BSV, logits_BSV, jnp.zeros((), dtype)).sum(-1)
    entropy, weight = ((log_z_BS - target_BS) * mask_BS).sum(), mask_BS.sum()
    loss = entropy
    if z_loss:
        loss = entropy + jnp.asarray(z_loss, dtype) * (jnp.square(log_z_BS) * mask_BS).sum()
    return loss, weight, {"cross_entropy": (entropy, weight)}


def chunked_cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    x_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> Loss:
    """The same as `cross_entropy(head(x), ...)` with the logits of only `chunk` positions alive at a time.

    Args:
      head: `[B, chunk, D]` to logits `[B, chunk, V]`; recomputed in the backward pass.
      chunk: positions per chunk; divides S.

    Raises:
      UserError: the chunk does not divide the sequence.
    """
    length = x_BSD.shape[1]
    if chunk < 1 or length % chunk:
        raise UserError(f"loss_chunk {chunk} does not divide the sequence of {length}; use a divisor of {length}")
    count = length // chunk

    def split(a: jax.Array) -> jax.Array:
        # Chunk i holds positions i::count, so that a sequence split over devices stays where it is.
        return jnp.moveaxis(a.reshape(a.shape[0], chunk, count, *a.shape[2:]), 2, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(carry: None, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, Loss]:
        x, targets, mask = part
        return carry, cross_entropy(head(constrain(x, "batch", "seq", None)), targets, mask, z_loss=z_loss)

    _, parts = jax.lax.scan(one, None, (split(x_BSD), split(targets_BS), split(mask_BS)))
    return jax.tree.map(lambda a: a.sum(0), parts)
