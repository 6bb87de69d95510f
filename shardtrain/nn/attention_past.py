"""Attention of a few new tokens to themselves and to the kept keys and values of all tokens before them.

Shapes: B batch, S new tokens, T slots of the past, H query heads, G key/value heads, R = H / G, K head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from shardtrain.nn.attention_kernels import groups_stay_together
from shardtrain.weights.precision import at_least_float32

KeysValues = tuple[jax.Array, ...]


def attend_past(
    q_BSHK: jax.Array,
    new: KeysValues,
    past: KeysValues,
    positions_BS: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Compute causal attention `[B, S, H, K]`, in the dtype of `q`, with the softmax in at least float32.

    Past and new tokens have a sum each, over one common maximum, so that a past that is split over devices stays so.

    Args:
      q_BSHK: queries.
      new: keys and values of the same tokens, `[B, S, G, K]` each.
      past: keys and values of earlier ones, `[B, T, G, K]` each. That of position `p` is in slot `p`; slots from the
        row's first new position on are ignored.
      positions_BS: of the new tokens; the rows need not be alike.
      window: as for `attend`.
      soft_cap: as for `attend`.
    """
    B, S, H, K = q_BSHK.shape
    if not groups_stay_together():
        new, past = (tuple(jnp.repeat(a, H // a.shape[2], axis=2) for a in pair) for pair in (new, past))
    dtype, G = at_least_float32(q_BSHK.dtype), new[0].shape[2]
    q_BSGRK = (q_BSHK * jnp.asarray(K**-0.5, q_BSHK.dtype)).reshape(B, S, G, H // G, K)

    def scores(k_BTGK: jax.Array, seen_BST: jax.Array, distance_BST: jax.Array) -> jax.Array:
        s_BGRST = jnp.einsum("BSGRK,BTGK->BGRST", q_BSGRK, k_BTGK, preferred_element_type=dtype)
        if soft_cap is not None:
            s_BGRST = jnp.tanh(s_BGRST / soft_cap) * soft_cap
        if window is not None:
            seen_BST &= distance_BST < window
        return jnp.where(seen_BST[:, None, None], s_BGRST, -jnp.inf)

    slots_T, query_BS1 = jnp.arange(past[0].shape[1], dtype=positions_BS.dtype), positions_BS[:, :, None]
    among_BSS = query_BS1 - positions_BS[:, None, :]
    old_BGRST = scores(past[0], slots_T < positions_BS[:, :1, None], query_BS1 - slots_T)
    own_BGRSS = scores(new[0], among_BSS >= 0, among_BSS)
    # A token always sees itself, so the maximum is finite.
    top_BGRS1 = jnp.maximum(old_BGRST.max(-1, keepdims=True), own_BGRSS.max(-1, keepdims=True))
    old_BGRST, own_BGRSS = jnp.exp(old_BGRST - top_BGRS1), jnp.exp(own_BGRSS - top_BGRS1)
    total_BGRS1 = old_BGRST.sum(-1, keepdims=True) + own_BGRSS.sum(-1, keepdims=True)

    def mixed(weights_BGRST: jax.Array, v_BTGK: jax.Array) -> jax.Array:
        return jnp.einsum("BGRST,BTGK->BSGRK", (weights_BGRST / total_BGRS1).astype(v_BTGK.dtype), v_BTGK)

    return (mixed(old_BGRST, past[1]) + mixed(own_BGRSS, new[1])).reshape(B, S, H, K)
