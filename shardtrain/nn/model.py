"""The contract between a model and everything that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from shardtrain.nn.context import Context
from shardtrain.nn.losses import Loss
from shardtrain.nn.stack import Aux, Stack

Batch = Mapping[str, jax.Array]


@runtime_checkable
class Model(Protocol):
    """A model in three parts, so that pipelines can cut it: embedder, equal blocks, head.

    `x` is any pytree of `[B, ...]` arrays. Weights that embedder and head share belong to the model itself. Every loss
    and metric is a `(sum, weight)` pair; the step divides, once, over the global batch. The weights depend on the batch
    only, never on parameters.
    """

    blocks: Stack

    def embedder(self, batch: Batch, ctx: Context) -> Any:
        """The batch as the first block's input."""

    def head(self, x: Any, batch: Batch, ctx: Context) -> Loss:
        """`(loss_sum, weight_sum, metrics)` of the last block's output."""


def forward(model: Model, batch: Batch, ctx: Context) -> tuple[Loss, Aux]:
    """Run the three parts in order: the head's loss and metrics, and the blocks' auxiliary terms."""
    x, aux = model.blocks(model.embedder(batch, ctx), ctx)
    return model.head(x, batch, ctx), aux
