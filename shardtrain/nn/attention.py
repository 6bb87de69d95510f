"""Multi-head and grouped-query self-attention with rotary positions.

Shapes: B batch, S sequence, D model dim, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.errors import UserError, refuse
from shardtrain.host.typed import typed
from shardtrain.nn.attention_kernels import Implementation, attend
from shardtrain.nn.attention_past import attend_past
from shardtrain.nn.context import Context
from shardtrain.nn.dropout import Dropout
from shardtrain.nn.linear import Linear, together
from shardtrain.nn.norm import RMSNorm
from shardtrain.nn.ranges import positive_problems
from shardtrain.nn.rope import rope_frequencies, rotate
from shardtrain.sharding import constrain, gather_residual
from shardtrain.sharding.mesh import divisors
from shardtrain.weights.precision import Precision


def head_problems(dim: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None) -> Iterator[UserError]:
    """Find the mistakes in the sizes of heads; `n_kv_heads` and `head_dim` are `None` where they follow from others."""
    empty = [*positive_problems({"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim})]
    if empty:
        yield from empty
        return
    if head_dim is None and dim % n_heads:
        rule = f"without head_dim, a head has {dim} / {n_heads} dims, which is not a whole number"
        yield UserError("n_heads", n_heads, rule, f"use a divisor of {dim}, or set head_dim")
    if n_kv_heads is not None and n_heads % n_kv_heads:
        yield UserError("n_kv_heads", n_kv_heads, f"must divide n_heads = {n_heads}", f"use one of {divisors(n_heads)}")


class Attention(nnx.Module):
    """Causal self-attention (Vaswani et al. 2017), with grouped queries (Ainslie et al. 2023).

    Args:
      dim: width of the input and the output.
      n_heads: query heads.
      n_kv_heads: key and value heads, each shared by a group of query heads; default `n_heads`.
      head_dim: width of a head; default `dim / n_heads`.
      rope_theta: base of the rotary frequencies.
      rope_scaling: extension of the rotary frequencies to longer sequences, see `rope_frequencies` in `nn/rope.py`.
      window: tokens that each token sees, itself included (Mistral); `None` for the whole past.
      qkv_bias: biases on query, key and value (Qwen 2).
      qk_norm: RMS-normalise queries and keys per head before rotation (Qwen 3).
      norm_eps: epsilon of these norms.
      logit_soft_cap: `soft_cap` of `attend`.
      implementation: see `attend`.
      dropout: dropout rate of the output.
      precision: dtypes.
      rngs: seeds of the weights.

    Raises:
      UserError: a number is out of range, the query heads are not a multiple of the key and value heads, the width is
        not a multiple of the heads and no head_dim is given, or rotary embedding refuses the sizes.

    Example:
      >>> layer = nn.Attention(8, n_heads=4, n_kv_heads=2, rngs=nnx.Rngs(0))
      >>> ctx = nn.Context({"positions": jnp.arange(5)[None]})
      >>> layer(jnp.ones((1, 5, 8)), ctx).shape
      (1, 5, 8)
    """

    @typed
    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        window: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        logit_soft_cap: float | None = None,
        implementation: Implementation = "auto",
        dropout: float = 0.0,
        precision: Precision = Precision(),
        rngs: nnx.Rngs,
    ):
        refuse(head_problems(dim, n_heads, n_kv_heads, head_dim))
        positive = {"norm_eps": norm_eps, "rope_theta": rope_theta, "logit_soft_cap": logit_soft_cap}
        refuse(positive_problems(positive))
        groups = n_heads if n_kv_heads is None else n_kv_heads
        if window is not None and window < 1:
            raise UserError(f"sliding window {window} leaves nothing for a token to see; use 1 or more, or null")
        size = dim // n_heads if head_dim is None else head_dim
        self.window, self.soft_cap, self.implementation = window, logit_soft_cap, implementation
        frequencies, self.rope_factor = rope_frequencies(size, rope_theta, rope_scaling)
        self.rope_frequencies = tuple(frequencies.tolist())
        common: dict[str, Any] = {"precision": precision, "rngs": rngs}
        into_kv = ("BSD,DGK->BSGK", (dim, groups, size), ("embed", "kv_heads", "head_dim"))
        self.query = Linear(
            "BSD,DHK->BSHK", (dim, n_heads, size), ("embed", "heads", "head_dim"), bias=qkv_bias, **common
        )
        self.key = Linear(*into_kv, bias=qkv_bias, **common)
        self.value = Linear(*into_kv, bias=qkv_bias, **common)
        self.out = Linear("BSHK,HKD->BSD", (n_heads, size, dim), ("heads", "head_dim", "embed"), **common)
        self.query_norm = RMSNorm(size, eps=norm_eps, **common) if qk_norm else None
        self.key_norm = RMSNorm(size, eps=norm_eps, **common) if qk_norm else None
        self.dropout = Dropout(dropout, site="attention")

    def __call__(self, x_BSD: jax.Array, ctx: Context) -> jax.Array:
        """Map `[B, S, D]` to `[B, S, D]` in the compute dtype; reads `positions` and, if present, `segment_ids`."""
        x_BSD = gather_residual(x_BSD)
        q_BSHK, k_BSGK, v_BSGK = together(x_BSD, self.query, self.key, self.value)
        q_BSHK = constrain(self._position(q_BSHK, self.query_norm, ctx), "batch", "seq", "heads", None)
        k_BSGK = constrain(self._position(k_BSGK, self.key_norm, ctx), "batch", "seq", "kv_heads", None)
        v_BSGK = constrain(v_BSGK, "batch", "seq", "kv_heads", None)
        y_BSHK = self._attend(q_BSHK, k_BSGK, v_BSGK, ctx)
        y_BSD = self.out(checkpoint_name(constrain(y_BSHK, "batch", "seq", "heads", None), "attn_mixed"))
        return self.dropout(checkpoint_name(constrain(y_BSD, "batch", "seq_residual", None), "attn_out"), ctx)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of a training step per token for scores and weighted sums, without the matmuls with weights.

        Per query and visible key of each head 4 K forward, and twice that backward; a query sees (seq_len + 1) / 2 keys
        on average.
        """
        heads, head_dim = self.query.weight.shape[-2:]
        return 12.0 * heads * head_dim * (seq_len + 1) / 2

    def _attend(self, q_BSHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, ctx: Context) -> jax.Array:
        past = None if ctx.cache is None else ctx.cache.extend(k_BSGK, v_BSGK, axes=("kv_heads", None))
        if past is not None:
            positions, new = ctx.inputs["positions"], (k_BSGK, v_BSGK)
            return attend_past(q_BSHK, new, past, positions, window=self.window, soft_cap=self.soft_cap)
        return attend(
            checkpoint_name(q_BSHK, "query"),
            checkpoint_name(k_BSGK, "key"),
            checkpoint_name(v_BSGK, "value"),
            window=self.window,
            segment_ids_BS=ctx.inputs.get("segment_ids"),
            soft_cap=self.soft_cap,
            implementation=self.implementation,
        )

    def _position(self, x_BSHK: jax.Array, norm: RMSNorm | None, ctx: Context) -> jax.Array:
        x_BSHK = x_BSHK if norm is None else norm(x_BSHK)
        return rotate(x_BSHK, ctx.inputs["positions"], self.rope_frequencies, self.rope_factor)
