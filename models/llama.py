"""Llama 1-3, and by options Mistral, Qwen 2 and Qwen 3.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax import nnx

from shardtrain import nn


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, attention: Mapping[str, Any], *, dim: int, hidden: int, dropout: float, **common: Any):
        norm = {"eps": attention["norm_eps"], **common}
        self.attention_norm = nn.RMSNorm(dim, **norm)
        self.attention = nn.Attention(dim, dropout=dropout, **attention, **common)
        self.mlp_norm = nn.RMSNorm(dim, **norm)
        self.mlp = nn.GatedMLP(dim, hidden, dropout=dropout, **common)

    def __call__(self, x_BSD: jax.Array, ctx: nn.Context) -> tuple[jax.Array, dict[str, Any]]:
        """Apply one transformer block, which has no auxiliary terms."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), ctx)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD), ctx), {}


class Llama(nnx.Module):
    """A decoder-only language model (Touvron et al. 2023).

    Args:
      n_layers: number of blocks.
      d_model: width of the residual stream.
      n_heads: query heads.
      n_kv_heads: key and value heads, which the query heads share in groups; default `n_heads`.
      head_dim: width of a head (Qwen 3); default `d_model / n_heads`.
      d_ff: hidden width of the MLP.
      vocab_size: rows of the embedding.
      rope_theta: base of the rotary frequencies (500,000 for Llama 3).
      rope_scaling: extension to longer sequences (Llama 3.1), see `rope_frequencies` in `nn/rope.py`.
      norm_eps: added to the mean square in norms.
      qkv_bias: biases on query, key and value (Qwen 2).
      qk_norm: norms on query and key (Qwen 3).
      tie_embeddings: use the embedding as the output head, too (Qwen 2, Llama 3.2).
      sliding_window: tokens that each token sees, itself included (Mistral); `None` for the whole past.
      logit_soft_cap: soft cap of the attention scores (Gemma 2).
      attention: the attention kernel, see `nn.attend`.
      dropout: rate after attention and MLP.
      remat: what the backward pass recomputes, see `nn.Stack`.
      scan: one loop over the blocks, see `nn.Stack`.
      z_loss: see `nn.linear_cross_entropy`.
      loss_chunk: `chunk` of `nn.linear_cross_entropy`.
      mup_base: mu-parametrisation: the width at which the learning rate was tuned, which `d_model` then shares. Widen
        by heads, not by their width.
      precision: dtypes.
      rngs: seeds of the weights.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        d_ff: int,
        vocab_size: int,
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        tie_embeddings: bool = False,
        sliding_window: int | None = None,
        logit_soft_cap: float | None = None,
        attention: nn.Implementation = "auto",
        dropout: float = 0.0,
        remat: str | list[str] = "full",
        scan: bool = True,
        z_loss: float = 0.0,
        loss_chunk: int | Literal["auto"] | None = "auto",
        mup_base: int | None = None,
        precision: nn.Precision = nn.Precision(),
        rngs: nnx.Rngs,
    ):
        self.z_loss, self.loss_chunk = z_loss, loss_chunk
        self.width_multiplier = 1.0 if mup_base is None else d_model / mup_base
        options = {
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "window": sliding_window,
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "norm_eps": norm_eps,
            "logit_soft_cap": logit_soft_cap,
            "implementation": attention,
        }

        def block(rngs: nnx.Rngs) -> Block:
            return Block(options, dim=d_model, hidden=d_ff, dropout=dropout, precision=precision, rngs=rngs)

        wide = jax.nn.initializers.normal((mup_base or d_model) ** -0.5)
        self.embedding = nn.Embedding(vocab_size, d_model, init=wide, precision=precision, rngs=rngs)
        self.blocks = nn.Stack(block, n_layers, remat=remat, scan=scan, rngs=rngs)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps, precision=precision, rngs=rngs)
        head = ("BSD,DV->BSV", (d_model, vocab_size), ("embed", "vocab"))
        small = jax.nn.initializers.normal(0.02)  # near-uniform predictions at the start: a loss near log(vocab_size)
        self.unembedding = (
            None if tie_embeddings else nn.Linear(*head, role="head", init=small, precision=precision, rngs=rngs)
        )

    def flops_per_token(self, seq_len: int) -> float:
        """Count the FLOPs of a training step per token, for MFU."""
        attention = self.blocks.layer.attention.flops_per_token(seq_len)
        return nn.matmul_flops(self) + self.blocks.n_layers * attention

    def embedder(self, batch: nn.Batch, ctx: nn.Context) -> jax.Array:
        """Look up the token vectors `[B, S, D]`."""
        return self.embedding(batch["tokens"])

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """Turn the last block's output into logits `[B, S, V]`."""
        return nn.logits(self._features(x_BSD), self.unembedding or self.embedding)

    def head(self, x_BSD: jax.Array, batch: nn.Batch, ctx: nn.Context) -> nn.Loss:
        """Sum the next-token cross entropy: `(loss_sum, weight_sum, metrics)`."""
        layer, labels = self.unembedding or self.embedding, (batch["targets"], batch["loss_mask"])
        features_BSD = self._features(x_BSD)
        return nn.linear_cross_entropy(features_BSD, layer, *labels, chunk=self.loss_chunk, z_loss=self.z_loss)

    def _features(self, x_BSD: jax.Array) -> jax.Array:
        """The input of the output head."""
        x_BSD = self.norm(x_BSD)
        return x_BSD if self.width_multiplier == 1 else x_BSD / self.width_multiplier
