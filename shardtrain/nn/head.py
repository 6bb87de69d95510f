"""The output head of a language model: its logits, and their cross entropy without all logits in memory at once.

Shapes: B batch, S sequence, D model dim, V vocabulary, N chunks, C positions of a chunk, P devices that share the
batch's rows, Q devices that share its positions.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardtrain.errors import UserError
from shardtrain.nn.embedding import Embedding
from shardtrain.nn.linear import Linear
from shardtrain.nn.losses import Loss, cross_entropy, logits_gradient, loss_sums, no_gradient, softmax_terms
from shardtrain.nn.matmul import Axes, einsum, gathered, scattered
from shardtrain.sharding import constrain, gather_residual, shards
from shardtrain.weights.precision import Precision, at_least_float32

Chunk = int | Literal["auto"] | None

#: Logits that one device may hold at a time under `chunk="auto"`: 256 MiB of float32.
_AUTO = 2**26


def logits(x_BSD: jax.Array, layer: Embedding | Linear) -> jax.Array:
    """The logits `[B, S, V]` of the last block's output, in the compute dtype.

    Args:
      x_BSD: the input of the head, already normalised.
      layer: as for `linear_cross_entropy`.

    Raises:
      UserError: the layer is not an output head.

    Example:
      >>> table = nn.Embedding(16, 4, rngs=nnx.Rngs(0))
      >>> nn.logits(jnp.ones((2, 3, 4)), table).shape
      (2, 3, 16)
    """
    w, axes, precision = _parts(layer)
    return einsum(_equation(axes), gather_residual(x_BSD).astype(precision.compute), w, axes, precision)


def linear_cross_entropy(
    x_BSD: jax.Array,
    layer: Embedding | Linear,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    *,
    chunk: Chunk = "auto",
    z_loss: float = 0.0,
) -> Loss:
    """`cross_entropy` of the logits of `layer(x)`, of which only those of `chunk` positions exist at a time.

    The backward pass computes the logits of each chunk again: four matmuls of that size instead of three. The weight is
    gathered once forward and once backward. Its gradient is summed over the chunks in at least float32 on each device,
    then reduced over devices in `precision.gradient`, once and not once per chunk.

    Args:
      x_BSD: the input of the head, already normalised.
      layer: the head, a `Linear` without a bias and with axes `("embed", "vocab")`, or the `Embedding` (tied). It
        brings its precision.
      targets_BS: int labels, see `cross_entropy`.
      mask_BS: weight of each token, see `cross_entropy`.
      chunk: positions per chunk, a divisor of S. `None` takes all of them at once and keeps the logits for the backward
        pass; `auto` takes as many as keep the logits of a device within 256 MiB.
      z_loss: see `cross_entropy`.

    Returns:
      See `cross_entropy`.

    Raises:
      UserError: the sequence is not a multiple of the chunk, or the layer is not an output head.

    Example:
      >>> x, table = jnp.ones((2, 6, 4)), nn.Embedding(16, 4, rngs=nnx.Rngs(0))
      >>> loss, weight, _ = nn.linear_cross_entropy(x, table, jnp.zeros((2, 6), "i4"), jnp.ones((2, 6)), chunk=3)
      >>> float(weight)
      12.0
    """
    w, axes, precision = _parts(layer)
    count = chunk_count(chunk, x_BSD.shape, w.shape[axes.index("vocab")])
    x_BSD = x_BSD.astype(precision.compute)
    if count == 1:
        return cross_entropy(einsum(_equation(axes), x_BSD, w, axes, precision), targets_BS, mask_BS, z_loss=z_loss)
    log_z_BS, target_BS = _chunked_terms(x_BSD, w, targets_BS, axes, precision, count)
    return loss_sums(log_z_BS, target_BS, targets_BS, mask_BS, z_loss)


def chunk_count(chunk: Chunk, shape: tuple[int, ...], vocab: int) -> int:
    """The number of chunks that the positions of `[B, S, ...]` are cut into.

    Raises:
      UserError: the sequence is not a multiple of the chunk.
    """
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


def _parts(layer: Embedding | Linear) -> tuple[jax.Array, Axes, Precision]:
    """Weight, logical axes and precision of an output head."""
    if len(layer.axes) != 2 or "vocab" not in layer.axes or getattr(layer, "bias", None) is not None:
        bias = ", with a bias" if getattr(layer, "bias", None) is not None else ""
        raise UserError(
            f"the output head has a weight with axes {layer.axes}{bias}; it must have the axes ('embed', 'vocab') or "
            "('vocab', 'embed') and no bias: use such a layer, or nn.cross_entropy of logits of your own"
        )
    return layer.weight[...], layer.axes, layer.precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunked_terms(
    x_BSD: jax.Array, w: jax.Array, targets_BS: jax.Array, axes: Axes, precision: Precision, count: int
) -> tuple[jax.Array, jax.Array]:
    """`softmax_terms` of `x @ w`, chunk by chunk."""
    w = gathered(w, axes, precision.compute)

    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        return None, softmax_terms(_chunk_logits(part[0], w, axes), part[1])

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
        dlogits_BCV = logits_gradient(_chunk_logits(x_BCD, w_used, axes), *rest)
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
    return _join(dx), scattered(dw, axes, w.dtype), no_gradient(targets_BS)


_chunked_terms.defvjp(_chunked_fwd, _chunked_bwd)


def _chunk_logits(x_BCD: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    logits_BCV = jnp.einsum(_equation(axes), constrain(x_BCD, "batch", "seq", None), w)
    return constrain(logits_BCV, "batch", "seq", "vocab")


def _labels(axes: Axes) -> str:
    return "DV" if axes[1] == "vocab" else "VD"


def _equation(axes: Axes) -> str:
    return f"BSD,{_labels(axes)}->BSV"


def _split(a_BSX: jax.Array, count: int) -> jax.Array:
    """`[B, S, ...]` as `[N, B, C, ...]`: chunk i is the positions i::N, so a split sequence stays where it is."""
    B, S, *rest = a_BSX.shape
    return jnp.moveaxis(a_BSX.reshape(B, S // count, count, *rest), 2, 0)


def _join(a_NBCX: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    N, B, C, *rest = a_NBCX.shape
    return jnp.moveaxis(a_NBCX, 0, 2).reshape(B, C * N, *rest)
