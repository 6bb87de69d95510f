"""Cross entropy over a vocabulary that may be sharded, as a sum and a weight, without float32 logits in memory.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.nn.ranges import check_z_loss
from shardtrain.sharding import constrain
from shardtrain.weights.precision import at_least_float32

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Loss = tuple[jax.Array, jax.Array, Metrics]


def cross_entropy(logits_BSV: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array, *, z_loss: float = 0.0) -> Loss:
    """Summed cross entropy in nats, its weight, and metrics, in at least float32.

    The logits are only reduced over the vocabulary, never indexed: with a sharded vocabulary each device sends three
    numbers per token instead of its logits. They are kept for the backward pass in their own dtype.

    Args:
      logits_BSV: unnormalised log-probabilities, any float dtype.
      targets_BS: int labels below V. A negative label, such as Hugging Face's -100, is ignored, like one of mask 0.
      mask_BS: weight of each token, 0 to ignore it.
      z_loss: coefficient of `logsumexp^2` (Chowdhery et al. 2022, section 5), which is part of the loss sum.

    Returns:
      The scalars `loss_sum` and `weight_sum`, and `{"cross_entropy": (sum, weight)}` without the z-loss.

    Raises:
      UserError: `z_loss` is not from 0 to 1.

    Example:
      >>> loss, weight, metrics = nn.cross_entropy(jnp.zeros((1, 3, 8)), jnp.array([[4, 2, -100]]), jnp.ones((1, 3)))
      >>> print(f"{loss / weight:.3f} nats per token, of {weight:.0f} tokens")
      2.079 nats per token, of 2 tokens
    """
    log_z_BS, target_BS = softmax_terms(constrain(logits_BSV, "batch", "seq", "vocab"), targets_BS)
    return loss_sums(log_z_BS, target_BS, targets_BS, mask_BS, z_loss)


def loss_sums(
    log_z_BS: jax.Array, target_BS: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array, z_loss: float
) -> Loss:
    """The sums that `cross_entropy` returns, from what `softmax_terms` returns."""
    check_z_loss(z_loss)
    mask_BS = jnp.where(targets_BS < 0, jnp.zeros((), log_z_BS.dtype), mask_BS.astype(log_z_BS.dtype))
    entropy, weight = ((log_z_BS - target_BS) * mask_BS).sum(), mask_BS.sum()
    loss = entropy
    if z_loss:
        loss = entropy + jnp.asarray(z_loss, entropy.dtype) * (jnp.square(log_z_BS) * mask_BS).sum()
    return loss, weight, {"cross_entropy": (entropy, weight)}


def _hits(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BS.dtype, logits_BSV.shape, 2) == targets_BS[..., None]


@jax.custom_vjp
def softmax_terms(logits_BSV: jax.Array, targets_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the softmax's denominator, and the target's logit, `[B, S]` each, in at least float32."""
    wide_BSV = logits_BSV.astype(at_least_float32(logits_BSV.dtype))
    top_BS = wide_BSV.max(-1)
    log_z_BS = top_BS + jnp.log(jnp.exp(wide_BSV - top_BS[..., None]).sum(-1))
    return log_z_BS, jnp.where(_hits(wide_BSV, targets_BS), wide_BSV, jnp.zeros((), wide_BSV.dtype)).sum(-1)


def logits_gradient(
    logits_BSV: jax.Array, targets_BS: jax.Array, log_z_BS: jax.Array, dlog_z_BS: jax.Array, dtarget_BS: jax.Array
) -> jax.Array:
    """The gradient of the logits, from those of the two values that `softmax_terms` returns."""
    softmax_BSV = jnp.exp(logits_BSV.astype(log_z_BS.dtype) - log_z_BS[..., None])
    hit_BSV = jnp.where(_hits(logits_BSV, targets_BS), dtarget_BS[..., None], jnp.zeros((), dtarget_BS.dtype))
    return (softmax_BSV * dlog_z_BS[..., None] + hit_BSV).astype(logits_BSV.dtype)


def _terms_fwd(logits_BSV: jax.Array, targets_BS: jax.Array) -> Any:
    out = softmax_terms(logits_BSV, targets_BS)
    return out, (logits_BSV, targets_BS, out[0])


def _terms_bwd(saved: tuple[jax.Array, jax.Array, jax.Array], dout: tuple[jax.Array, jax.Array]) -> Any:
    return logits_gradient(*saved, *dout), no_gradient(saved[1])


softmax_terms.defvjp(_terms_fwd, _terms_bwd)


def no_gradient(integers: jax.Array) -> np.ndarray:
    """The gradient of an integer argument, as JAX wants it."""
    return np.zeros(integers.shape, jax.dtypes.float0)
