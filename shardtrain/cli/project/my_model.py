"""A small GPT, written as if for one device. `shardtrain.nn` has the layers; any Flax NNX layer works, too.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from shardtrain import nn


class Block(nnx.Module):
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(self, d_model: int, n_heads: int, **common: Any):
        self.attention_norm = nn.RMSNorm(d_model, **common)
        self.attention = nn.Attention(d_model, n_heads, **common)
        self.mlp_norm = nn.RMSNorm(d_model, **common)
        self.mlp = nn.GatedMLP(d_model, 4 * d_model, **common)

    def __call__(self, x_BSD: jax.Array, ctx: nn.Context) -> tuple[jax.Array, dict[str, Any]]:
        """Apply one block; the dict is for auxiliary losses, of which there are none."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), ctx)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD), ctx), {}


class GPT(nnx.Module):
    """A language model in three parts, `embedder`, `blocks` and `head`, so that a pipeline can cut it.

    Args:
      n_layers: number of blocks.
      d_model: width of the residual stream.
      n_heads: heads of the attention.
      vocab_size: rows of the embedding, which is also the output head.
      precision: dtypes, from the config.
      rngs: seeds of the weights.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        d_model: int,
        n_heads: int,
        vocab_size: int,
        precision: nn.Precision = nn.Precision(),
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"precision": precision}
        self.embedding = nn.Embedding(vocab_size, d_model, rngs=rngs, **common)
        self.blocks = nn.Stack(lambda r: Block(d_model, n_heads, rngs=r, **common), n_layers, rngs=rngs)
        self.norm = nn.RMSNorm(d_model, rngs=rngs, **common)

    def embedder(self, batch: nn.Batch, ctx: nn.Context) -> jax.Array:
        """Look up the vectors of the tokens, `[B, S, D]`."""
        return self.embedding(batch["tokens"])

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """Turn the last block's output into logits, `[B, S, V]`. With this method a run can write samples."""
        return nn.logits(self.norm(x_BSD), self.embedding)

    def head(self, x_BSD: jax.Array, batch: nn.Batch, ctx: nn.Context) -> nn.Loss:
        """Return the summed loss, its weight, and metrics."""
        return nn.cross_entropy(self.logits(x_BSD), batch["targets"], batch["loss_mask"])
