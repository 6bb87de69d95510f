"""The smallest useful model: it predicts the next token from the current one, through residual MLP blocks.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from shardtrain import nn


class Block(nnx.Module):
    """`x + mlp(norm(x))`."""

    def __init__(self, dim: int, hidden: int, dropout: float, **common: Any):
        self.norm = nn.LayerNorm(dim, **common)
        self.mlp = nn.GatedMLP(dim, hidden, dropout=dropout, **common)

    def __call__(self, x_BSD: jax.Array, ctx: nn.Context) -> tuple[jax.Array, dict[str, Any]]:
        """Apply one residual block, which has no auxiliary terms."""
        return x_BSD + self.mlp(self.norm(x_BSD), ctx), {}


class MLP(nnx.Module):
    """An embedding, residual MLP blocks, and the embedding again as the output head.

    Args:
      n_layers: number of blocks.
      d_model: width of the residual stream.
      d_ff: hidden width of the blocks.
      vocab_size: rows of the embedding.
      dropout: rate after each MLP.
      precision: dtypes.
      rngs: seeds of the weights.
    """

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

    def embedder(self, batch: nn.Batch, ctx: nn.Context) -> jax.Array:
        """Look up the token vectors `[B, S, D]`."""
        return self.embedding(batch["tokens"])

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """Turn the last block's output into logits `[B, S, V]`."""
        return nn.logits(self.norm(x_BSD), self.embedding)

    def head(self, x_BSD: jax.Array, batch: nn.Batch, ctx: nn.Context) -> nn.Loss:
        """Sum the next-token cross entropy: `(loss_sum, weight_sum, metrics)`."""
        return nn.cross_entropy(self.logits(x_BSD), batch["targets"], batch["loss_mask"])
