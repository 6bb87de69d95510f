"""Softmax attention itself: one function, several implementations.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, R = H / G, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardtrain.errors import UserError
from shardtrain.launch.xla_flags import cuda_capability
from shardtrain.sharding import current, shards
from shardtrain.weights.precision import at_least_float32

Implementation = Literal["auto", "einsum", "xla", "cudnn"]


def attention_mask(
    length: int, window: int | None = None, segment_ids_BS: jax.Array | None = None, causal: bool = True
) -> jax.Array | None:
    """Compute which keys each query sees, bool `[B or 1, 1, S, T]`; `None` if it sees all.

    Args:
      length: queries and keys of a sequence.
      window: a query sees this many keys, itself included.
      segment_ids_BS: queries see only keys of their own segment (packed documents).
      causal: queries see no keys of later positions.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask: jax.Array | None = (query >= key)[None, None] if causal else None
    if window is not None:
        near = (abs(query - key) < window)[None, None]
        mask = near if mask is None else mask & near
    if segment_ids_BS is not None:
        same = (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


@jax.named_scope("attention")  # by which a profile tells it from other matmuls
def attend(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids_BS: jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Compute attention `[B, S, H, K]`, in the dtype of `q`, with the softmax in at least float32.

    Args:
      q_BSHK: queries.
      k_BTGK: keys, of as many heads as the queries or a divisor of these.
      v_BTGK: values, of the heads of the keys.
      causal: queries see no keys of later positions.
      window: keys that each query sees, itself included; `None` for all.
      segment_ids_BS: queries see only keys of their own segment (packed documents).
      soft_cap: scores become `cap * tanh(scores / cap)` (Gemma 2).
      scale: factor of the scores; default `K ** -0.5`.
      implementation: `einsum` (any device, exact in float64), `xla` (`jax.nn.dot_product_attention`), `cudnn` (fused),
        or `auto`, which takes `cudnn` on NVIDIA GPUs where it applies and `einsum` otherwise.

    Raises:
      UserError: the requested implementation cannot do this here; it is never replaced by another.

    Example:
      >>> nn.attend(jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8)), jnp.ones((2, 5, 2, 8))).shape
      (2, 5, 4, 8)
    """
    scale = q_BSHK.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "auto" or implementation == "cudnn":
        obstacles = "; ".join(_cudnn_obstacles(q_BSHK, soft_cap))
        if implementation == "cudnn" and obstacles:
            raise UserError(f"attention: cudnn is not available here: {obstacles}; use attention: auto, xla or einsum")
        implementation = "einsum" if obstacles else "cudnn"
    if implementation == "xla" and soft_cap is not None:
        raise UserError(f"attention: xla has no logit_soft_cap, which is {soft_cap}; use attention: einsum")
    if not groups_stay_together():
        k_BTGK, v_BTGK = (jnp.repeat(a, q_BSHK.shape[2] // a.shape[2], axis=2) for a in (k_BTGK, v_BTGK))
    if implementation == "einsum":
        mask = attention_mask(q_BSHK.shape[1], window, segment_ids_BS, causal)
        return _einsum_attention(q_BSHK, k_BTGK, v_BTGK, mask, soft_cap, scale)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if segment_ids is None else attention_mask(q.shape[1], None, segment_ids, causal=False),
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0 if causal else window - 1),
            scale=scale,
            implementation=implementation,
        )

    return _by_rows_and_heads(attention, q_BSHK, k_BTGK, v_BTGK, segment_ids_BS)


def groups_stay_together() -> bool:
    """Whether a device that holds some query heads also holds their keys, and starts at the first head of a group."""
    partitioner = current()
    return partitioner is None or partitioner.spec("heads") == partitioner.spec("kv_heads")


def _by_rows_and_heads(
    attention: Callable[..., jax.Array],
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """Run attention on each device's own rows and heads, where a device holds whole sequences.

    By itself, the compiler asks JAX's cuDNN call how to split it, which fails in a pipeline (JAX 0.10.2, 0.12).
    """
    segment_ids = [] if segment_ids_BS is None else [segment_ids_BS]
    partitioner = current()
    if partitioner is None or partitioner.mesh.size == 1 or partitioner.shards("seq") > 1:
        return attention(q_BSHK, k_BTGK, v_BTGK, *segment_ids)
    heads = ("batch", None, "heads", None)
    rows = [(ids, ("batch", None)) for ids in segment_ids]
    return partitioner.per_device(attention, *((a, heads) for a in (q_BSHK, k_BTGK, v_BTGK)), *rows, out=heads)


def _einsum_attention(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask: Any, soft_cap: float | None, scale: float
) -> jax.Array:
    dtype = at_least_float32(q_BSHK.dtype)
    B, S, H, K = q_BSHK.shape
    G, R = k_BTGK.shape[2], H // k_BTGK.shape[2]
    # One matmul per row and key head, over all N = S x R queries of the group: with a separate dim for R, a step takes
    # up to 2.3 times as long on XLA's CPU backend. S is the outer dim, so that a mesh that splits it moves nothing.
    q_BGNK = (q_BSHK * jnp.asarray(scale, q_BSHK.dtype)).reshape(B, S, G, R, K).swapaxes(1, 2).reshape(B, G, S * R, K)
    k_BGTK, v_BGTK = k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)
    scores_BGNT = jnp.einsum("BGNK,BGTK->BGNT", q_BGNK, k_BGTK, preferred_element_type=dtype)
    if soft_cap is not None:
        scores_BGNT = jnp.tanh(scores_BGNT / soft_cap) * soft_cap
    if mask is not None:
        scores_BGNT = jnp.where(jnp.repeat(mask, R, axis=2), scores_BGNT, jnp.finfo(dtype).min)
    weights_BGNT = jax.nn.softmax(scores_BGNT, axis=-1).astype(v_BTGK.dtype)
    y_BGNK = jnp.einsum("BGNT,BGTK->BGNK", weights_BGNT, v_BGTK)
    return y_BGNK.reshape(B, G, S, R, K).swapaxes(1, 2).reshape(B, S, H, K)


def _cudnn_obstacles(q_BSHK: jax.Array, soft_cap: float | None) -> Iterator[str]:
    partitioner = current()
    device = partitioner.mesh.devices.flat[0] if partitioner is not None else jax.devices()[0]
    capability = cuda_capability(device)
    if capability is None:
        yield f"the devices are {device.platform}, not NVIDIA GPUs"
    if q_BSHK.dtype not in (jnp.bfloat16, jnp.float16):
        yield f"it needs bfloat16 or float16, and precision.compute is {q_BSHK.dtype}"
    most = 256 if capability is not None and capability >= 9 else 128
    if q_BSHK.shape[-1] % 8 or q_BSHK.shape[-1] > most:
        yield f"it needs a head_dim that is a multiple of 8 and at most {most}, not {q_BSHK.shape[-1]}"
    if shards("seq") > 1:
        yield f"it needs whole sequences, and the mesh splits each into {shards('seq')}"
    if soft_cap is not None:
        yield f"it has no logit_soft_cap, which is {soft_cap}"
