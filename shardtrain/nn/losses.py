"""Cross entropy over a vocabulary that may be sharded, as sums and weights, without float32 logits in memory.

Shapes: B batch, S sequence, D model dim, V vocabulary, N chunks, C positions of a chunk, P devices that share the
batch's rows, Q devices that share its positions.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import UserError
from shardtrain.nn.linear import Axes, einsum, gathered, scattered
from shardtrain.sharding import constrain, shards
from shardtrain.weights.precision import Precision, at_least_float32

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Loss = tuple[jax.Array, jax.Array, Metrics]
Chunk = int | Literal["auto"] | None

#: Logits that one device may hold at a time under `chunk="auto"`: 256 MiB of float32.
_AUTO = 2**26


def cross_entropy(logits_BSV: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array, *, z_loss: float = 0.0) -> Loss:
    """Summed cross entropy in nats, its weight, and metrics, in at least float32.

    The logits are only ever reduced over the vocabulary, never indexed: with a sharded vocabulary each device sends
    three numbers per token instead of its logits. For the backward pass they are kept in their own dtype.

    Args:
      targets_BS: int labels below V. A negative one, such as Hugging Face's -100, is ignored, as one of mask 0.
      mask_BS: weight of each token, 0 to ignore it.
      z_loss: coefficient on `logsumexp^2` (Chowdhery et al. 2022, section 5), part of the loss sum.

    Returns:
      Scalars `loss_sum` and `weight_sum`, and `{"cross_entropy": (sum, weight)}` without the z-loss.
    """
    log_z_BS, target_BS = _terms(constrain(logits_BSV, "batch", "seq", "vocab"), targets_BS)
    return _total(log_z_BS, target_BS, targets_BS, mask_BS, z_loss)


def linear_cross_entropy(
    x_BSD: jax.Array,
    w: jax.Array,
    axes: Axes,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    *,
    chunk: Chunk = "auto",
    z_loss: float = 0.0,
    precision: Precision = Precision(),
) -> Loss:
    """`cross_entropy` of the logits `x @ w`, of which only those of `chunk` positions are alive at a time.

    The backward pass computes each chunk's logits again: four matmuls of that size in place of three. The weight is
    gathered once forward and once backward, and its gradient is summed over the chunks in at least float32 on each
    device, then reduced over devices in `precision.gradient` once: not once per chunk.

    Args:
      w: the head's weight as it is stored, `[D, V]` or, tied, `[V, D]`.
      axes: its logical axes, `("embed", "vocab")` or `("vocab", "embed")`.
      chunk: positions per chunk, which divides S; `None` for all of them, with the logits kept for the backward pass;
        `auto` for as many as keep the logits of a device within 256 MiB.

    Raises:
      UserError: the chunk does not divide the sequence.
    """
    count = chunk_count(chunk, x_BSD.shape, w.shape[axes.index("vocab")])
    x_BSD = x_BSD.astype(precision.compute)
    if count == 1:
        return cross_entropy(einsum(_logits(axes), x_BSD, w, axes, precision), targets_BS, mask_BS, z_loss=z_loss)
    log_z_BS, target_BS = _chunked_terms(x_BSD, w, targets_BS, axes, precision, count)
    return _total(log_z_BS, target_BS, targets_BS, mask_BS, z_loss)


def _total(log_z_BS: jax.Array, target_BS: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array, z_loss: float) -> Loss:
    mask_BS = jnp.where(targets_BS < 0, jnp.zeros((), log_z_BS.dtype), mask_BS.astype(log_z_BS.dtype))
    entropy, weight = ((log_z_BS - target_BS) * mask_BS).sum(), mask_BS.sum()
    loss = entropy
    if z_loss:
        loss = entropy + jnp.asarray(z_loss, entropy.dtype) * (jnp.square(log_z_BS) * mask_BS).sum()
    return loss, weight, {"cross_entropy": (entropy, weight)}


def chunk_count(chunk: Chunk, shape: tuple[int, ...], vocab: int) -> int:
    """Into how many chunks the positions of `[B, S, ...]` are cut."""
    B, S = shape[:2]
    if chunk is None:
        return 1
    if chunk == "auto":
        local = S // shards("seq")  # a device's own positions: each chunk has its share of them
        logits = B // shards("batch") * local * vocab // shards("vocab")
        return next(n for n in range(1, local + 1) if local % n == 0 and (logits <= n * _AUTO or n == local))
    if not isinstance(chunk, int) or chunk < 1 or S % chunk:
        raise UserError(f"loss_chunk {chunk} does not divide the sequence of {S}; use a divisor of {S}, auto or null")
    return S // chunk


def _hits(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BS.dtype, logits_BSV.shape, 2) == targets_BS[..., None]


@jax.custom_vjp
def _terms(logits_BSV: jax.Array, targets_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the softmax's sum, and the target's logit, `[B, S]` each in at least float32."""
    wide_BSV = logits_BSV.astype(at_least_float32(logits_BSV.dtype))
    top_BS = wide_BSV.max(-1)
    log_z_BS = top_BS + jnp.log(jnp.exp(wide_BSV - top_BS[..., None]).sum(-1))
    return log_z_BS, jnp.where(_hits(wide_BSV, targets_BS), wide_BSV, jnp.zeros((), wide_BSV.dtype)).sum(-1)


def _dlogits(
    logits_BSV: jax.Array, targets_BS: jax.Array, log_z_BS: jax.Array, dlog_z_BS: jax.Array, dtarget_BS: jax.Array
) -> jax.Array:
    softmax_BSV = jnp.exp(logits_BSV.astype(log_z_BS.dtype) - log_z_BS[..., None])
    hit_BSV = jnp.where(_hits(logits_BSV, targets_BS), dtarget_BS[..., None], jnp.zeros((), dtarget_BS.dtype))
    return (softmax_BSV * dlog_z_BS[..., None] + hit_BSV).astype(logits_BSV.dtype)


def _terms_fwd(logits_BSV: jax.Array, targets_BS: jax.Array) -> Any:
    out = _terms(logits_BSV, targets_BS)
    return out, (logits_BSV, targets_BS, out[0])


def _terms_bwd(saved: tuple[jax.Array, jax.Array, jax.Array], dout: tuple[jax.Array, jax.Array]) -> Any:
    return _dlogits(*saved, *dout), _no_gradient(saved[1])


_terms.defvjp(_terms_fwd, _terms_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunked_terms(
    x_BSD: jax.Array, w: jax.Array, targets_BS: jax.Array, axes: Axes, precision: Precision, count: int
) -> tuple[jax.Array, jax.Array]:
    """`_terms` of `x @ w`, chunk by chunk."""
    w = gathered(w, axes, precision.compute)

    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        return None, _terms(_chunk_logits(part[0], w, axes), part[1])

    _, terms = jax.lax.scan(one, None, (_split(x_BSD, count), _split(targets_BS, count)))
    return jax.tree.map(_join, terms)


def _chunked_fwd(
    x_BSD: jax.Array, w: jax.Array, targets_BS: jax.Array, axes: Axes, precision: Precision, count: int
) -> Any:
    out = _chunked_terms(x_BSD, w, targets_BS, axes, precision, count)
    return out, (x_BSD, w, targets_BS, out[0])


def _chunked_bwd(axes: Axes, precision: Precision, count: int, saved: tuple[Any, ...], dout: tuple[Any, Any]) -> Any:
    x_BSD, w, targets_BS, log_z_BS = saved
    w_used, labels, devices = gathered(w, axes, precision.compute), _labels(axes), (shards("batch"), shards("seq"))

    wide = at_least_float32(precision.gradient)
    used = tuple("vocab" if axis == "vocab" else None for axis in axes)

    def by_device(a_BCX: jax.Array, last: str | None) -> jax.Array:
        (P, Q), (B, C, X) = devices, a_BCX.shape
        a_PQBCX = a_BCX.reshape(P, B // P, Q, C // Q, X).swapaxes(1, 2)
        return constrain(a_PQBCX, "batch", "seq", None, None, last)

    def one(dw: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_BCD, *rest = part
        dlogits_BCV = _dlogits(_chunk_logits(x_BCD, w_used, axes), *rest)
        dx_BCD = jnp.einsum(f"BSV,{labels}->BSD", dlogits_BCV, w_used)
        more = jnp.einsum(
            f"PQBCD,PQBCV->PQ{labels}",
            by_device(x_BCD, None),
            by_device(dlogits_BCV, "vocab"),
            preferred_element_type=wide,
        )
        return constrain(dw + more, "batch", "seq", *used), constrain(dx_BCD, "batch", "seq", None)

    zeros = jnp.zeros((*devices, *w.shape), wide)
    parts = tuple(_split(a, count) for a in (x_BSD, targets_BS, log_z_BS, *dout))
    dw, dx = jax.lax.scan(one, constrain(zeros, "batch", "seq", *used), parts)
    dw = jax.lax.reduce_sum(dw.astype(precision.gradient), (0, 1))  # `sum` would widen what is sent
    return _join(dx), scattered(dw, axes, w.dtype), _no_gradient(targets_BS)


_chunked_terms.defvjp(_chunked_fwd, _chunked_bwd)


def _chunk_logits(x_BCD: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    logits_BCV = jnp.einsum(_logits(axes), constrain(x_BCD, "batch", "seq", None), w)
    return constrain(logits_BCV, "batch", "seq", "vocab")


def _labels(axes: Axes) -> str:
    return "DV" if axes[1] == "vocab" else "VD"


def _logits(axes: Axes) -> str:
    return f"BSD,{_labels(axes)}->BSV"


def _split(a_BSX: jax.Array, count: int) -> jax.Array:
    """`[B, S, ...]` as `[N, B, C, ...]`: chunk i is the positions i::N, so a split sequence stays where it is."""
    B, S, *rest = a_BSX.shape
    return jnp.moveaxis(a_BSX.reshape(B, S // count, count, *rest), 2, 0)


def _join(a_NBCX: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    N, B, C, *rest = a_NBCX.shape
    return jnp.moveaxis(a_NBCX, 0, 2).reshape(B, C * N, *rest)


def _no_gradient(integers: jax.Array) -> np.ndarray:
    return np.zeros(integers.shape, jax.dtypes.float0)
