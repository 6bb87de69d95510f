"""The smallest useful model: predicts the next token from the current one, through residual MLP blocks."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from shardtrain import nn
from shardtrain.nn.losses import Loss
from shardtrain.nn.model import Batch
from shardtrain.sharding import constrain, gather_residual


class Block(nnx.Module):
    """`x + mlp(norm(x))`."""

    def __init__(self, dim: int, hidden: int, dropout: float, **common: Any):
        self.norm = nn.LayerNorm(dim, **common)
        self.mlp = nn.GatedMLP(dim, hidden, dropout=dropout, **common)

    def __call__(self, x_BSD: jax.Array, ctx: nn.Context) -> tuple[jax.Array, dict[str, Any]]:
        """One residual block; no auxiliary terms."""
        return constrain(x_BSD + self.mlp(self.norm(x_BSD), ctx), "batch", "seq_residual", None), {}


class MLP(nnx.Module):
    """Embedding, `n_layers` residual MLP blocks, tied head."""

    def __init__(
        self,
        *,
        n_layers: int,
        d_model: int,
        d_ff: int,
        vocab_size: int,
        dropout: float = 0.0,
        precision: nn.Precision = nn.Precision(),
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"precision": precision}
        self.embedding = nn.Embedding(vocab_size, d_model, rngs=rngs, **common)
        self.blocks = nn.Stack(lambda r: Block(d_model, d_ff, dropout, rngs=r, **common), n_layers, rngs=rngs)
        self.norm = nn.LayerNorm(d_model, rngs=rngs, **common)

    def embedder(self, batch: Batch, ctx: nn.Context) -> jax.Array:
        """Token vectors `[B, S, D]`."""
        return constrain(self.embedding(batch["tokens"]), "batch", "seq_residual", None)

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """`[B, S, V]` of the last block's output."""
        return self.embedding.attend(gather_residual(self.norm(x_BSD)))

    def head(self, x_BSD: jax.Array, batch: Batch, ctx: nn.Context) -> Loss:
        """Next-token cross entropy, as `(loss_sum, weight_sum, metrics)`."""
        return nn.cross_entropy(self.logits(x_BSD), batch["targets"], batch["loss_mask"])
