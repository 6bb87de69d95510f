"""Softmax attention itself: one meaning, several implementations.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardtrain.errors import UserError
from shardtrain.nn.precision import at_least_float32
from shardtrain.sharding import current, pieces

Implementation = Literal["auto", "einsum", "xla", "cudnn"]


def attention_mask(
    length: int, window: int | None = None, segment_ids_BS: jax.Array | None = None, causal: bool = True
) -> jax.Array | None:
    """Which key each query sees, bool `[B or 1, 1, S, T]`; `None` when all.

    Args:
      window: a query sees this many keys, itself included.
      segment_ids_BS: queries see only keys of their own segment (packed documents).
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
    """Attention `[B, S, H, K]`, in the dtype of `q`; the softmax runs in at least float32.

    Args:
      scale: on the scores; default `K ** -0.5`.
      soft_cap: scores become `cap * tanh(scores / cap)` (Gemma 2).
      implementation: `einsum` (any device, exact in float64), `xla` (`jax.nn.dot_product_attention`), `cudnn` (fused),
        or `auto`, which takes `cudnn` on NVIDIA GPUs where it applies and `einsum` otherwise.

    Raises:
      UserError: the implementation asked for cannot do this here; it is never replaced by another.
    """
    scale = q_BSHK.shape[-1] ** -0.5 if scale is None else scale
    obstacles = "; ".join(_cudnn_obstacles(q_BSHK, soft_cap))
    if implementation == "auto":
        implementation = "einsum" if obstacles else "cudnn"
    if implementation == "cudnn" and obstacles:
        raise UserError(f"attention: cudnn is not available here: {obstacles}; use attention: auto, xla or einsum")
    if implementation == "xla" and soft_cap is not None:
        raise UserError(f"attention: xla has no logit_soft_cap (asked for {soft_cap}); use attention: einsum")
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


def _by_rows_and_heads(
    attention: Callable[..., jax.Array],
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """Attention of each device's own rows and heads, wherever it has all of the sequence.

    Left to itself, the compiler asks JAX's cuDNN call how to split it, which fails in a pipeline (JAX 0.10.2, 0.12).
    """
    segment_ids = [] if segment_ids_BS is None else [segment_ids_BS]
    partitioner = current()
    if partitioner is None or partitioner.mesh.size == 1 or partitioner.pieces("seq") > 1:
        return attention(q_BSHK, k_BTGK, v_BTGK, *segment_ids)
    if partitioner.pieces("kv_heads") != partitioner.pieces("heads"):  # a device's queries need not begin with a group
        k_BTGK, v_BTGK = (_each_head(a, q_BSHK.shape[2]) for a in (k_BTGK, v_BTGK))
    heads = ("batch", None, "heads", None)
    kv_heads = heads if k_BTGK.shape == q_BSHK.shape else ("batch", None, "kv_heads", None)
    rows = [(ids, ("batch", None)) for ids in segment_ids]
    return partitioner.per_device(attention, (q_BSHK, heads), (k_BTGK, kv_heads), (v_BTGK, kv_heads), *rows, out=heads)


def _einsum_attention(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask: Any, soft_cap: float | None, scale: float
) -> jax.Array:
    dtype = at_least_float32(q_BSHK.dtype)
    # Heads first, and no dim for groups: XLA on CPU takes up to 2.2 times as long for a step with "BSGRK,BTGK->BGRST".
    q_BHSK = (q_BSHK * jnp.asarray(scale, q_BSHK.dtype)).swapaxes(1, 2)
    k_BHTK, v_BHTK = (_each_head(a, q_BSHK.shape[2]).swapaxes(1, 2) for a in (k_BTGK, v_BTGK))
    scores_BHST = jnp.einsum("BHSK,BHTK->BHST", q_BHSK, k_BHTK, preferred_element_type=dtype)
    if soft_cap is not None:
        scores_BHST = jnp.tanh(scores_BHST / soft_cap) * soft_cap
    if mask is not None:
        scores_BHST = jnp.where(mask, scores_BHST, jnp.finfo(dtype).min)
    weights_BHST = jax.nn.softmax(scores_BHST, axis=-1).astype(v_BTGK.dtype)
    return jnp.einsum("BHST,BHTK->BHSK", weights_BHST, v_BHTK).swapaxes(1, 2)


def _each_head(a_BTGK: jax.Array, heads: int) -> jax.Array:
    """Keys or values once for each query head of their group."""
    repeats = heads // a_BTGK.shape[2]
    return a_BTGK if repeats == 1 else jnp.repeat(a_BTGK, repeats, axis=2)


def _cudnn_obstacles(q_BSHK: jax.Array, soft_cap: float | None) -> Iterator[str]:
    partitioner = current()
    device = partitioner.mesh.devices.flat[0] if partitioner is not None else jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        yield f"the devices are {device.platform}, not NVIDIA GPUs"
    if q_BSHK.dtype not in (jnp.bfloat16, jnp.float16):
        yield f"it needs bfloat16 or float16, and precision.compute is {q_BSHK.dtype}"
    most = 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128
    if q_BSHK.shape[-1] % 8 or q_BSHK.shape[-1] > most:
        yield f"it needs a head_dim that is a multiple of 8 and at most {most}, not {q_BSHK.shape[-1]}"
    if pieces("seq") > 1:
        yield f"it needs whole sequences, and the mesh splits each into {pieces('seq')}"
    if soft_cap is not None:
        yield f"it has no logit_soft_cap (asked for {soft_cap})"
