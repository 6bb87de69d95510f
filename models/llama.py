"""Llama 1-3, and by options Mistral, Qwen 2 and Qwen 3.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax import nnx

from shardtrain import nn
from shardtrain.nn.attention_kernels import Implementation
from shardtrain.nn.losses import Loss
from shardtrain.nn.model import Batch
from shardtrain.sharding import constrain, gather_residual


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, attention: Mapping[str, Any], *, dim: int, hidden: int, dropout: float, **common: Any):
        norm = {"eps": attention["norm_eps"], **common}
        self.attention_norm = nn.RMSNorm(dim, **norm)
        self.attention = nn.Attention(dim, dropout=dropout, **attention, **common)
        self.mlp_norm = nn.RMSNorm(dim, **norm)
        self.mlp = nn.GatedMLP(dim, hidden, dropout=dropout, **common)

    def __call__(self, x_BSD: jax.Array, ctx: nn.Context) -> tuple[jax.Array, dict[str, Any]]:
        """One transformer block; no auxiliary terms."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), ctx)
        x_BSD = x_BSD + self.mlp(self.mlp_norm(x_BSD), ctx)
        return constrain(x_BSD, "batch", "seq_residual", None), {}


class Llama(nnx.Module):
    """A decoder-only language model (Touvron et al. 2023).

    Options for its relatives: Mistral `sliding_window`; Qwen 2 `qkv_bias`, `tie_embeddings`; Qwen 3 `qk_norm`,
    `head_dim`; Llama 3 `rope_theta`, `rope_scaling`; Gemma 2 `logit_soft_cap` (on attention scores).

    Args:
      attention: attention kernel, see `nn.attend`.
      remat, scan: see `nn.Stack`.
      z_loss, loss_chunk: see `nn.linear_cross_entropy`.
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
        attention: Implementation = "auto",
        dropout: float = 0.0,
        remat: str | list[str] = "full",
        scan: bool = True,
        z_loss: float = 0.0,
        loss_chunk: int | Literal["auto"] | None = "auto",
        precision: nn.Precision = nn.Precision(),
        rngs: nnx.Rngs,
    ):
        self.z_loss, self.loss_chunk = z_loss, loss_chunk
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

        self.embedding = nn.Embedding(vocab_size, d_model, precision=precision, rngs=rngs)
        self.blocks = nn.Stack(block, n_layers, remat=remat, scan=scan, rngs=rngs)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps, precision=precision, rngs=rngs)
        head = ("BSD,DV->BSV", (d_model, vocab_size), ("embed", "vocab"))
        small = jax.nn.initializers.normal(0.02)  # near-uniform predictions at the start: a loss near log(vocab_size)
        self.unembedding = (
            None if tie_embeddings else nn.Linear(*head, role="head", init=small, precision=precision, rngs=rngs)
        )

    def embedder(self, batch: Batch, ctx: nn.Context) -> jax.Array:
        """Token vectors `[B, S, D]`."""
        return constrain(self.embedding(batch["tokens"]), "batch", "seq_residual", None)

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """`[B, S, V]` of the last block's output."""
        x_BSD = gather_residual(self.norm(x_BSD))
        return self.embedding.attend(x_BSD) if self.unembedding is None else self.unembedding(x_BSD)

    def head(self, x_BSD: jax.Array, batch: Batch, ctx: nn.Context) -> Loss:
        """Next-token cross entropy, as `(loss_sum, weight_sum, metrics)`."""
        targets, mask = batch["targets"], batch["loss_mask"]
        layer = self.embedding if self.unembedding is None else self.unembedding
        return nn.linear_cross_entropy(
            self.norm(x_BSD),
            layer.weight[...],
            layer.axes,
            targets,
            mask,
            chunk=self.loss_chunk,
            z_loss=self.z_loss,
            precision=layer.precision,
        )
