"""The contract between a model and the code that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from shardtrain.nn.context import Context
from shardtrain.nn.losses import Loss
from shardtrain.nn.returned import Sums, checked_loss, checked_rows, refuse_sown
from shardtrain.nn.stack import Aux, Stack

Batch = Mapping[str, jax.Array]


@runtime_checkable
class Model(Protocol):
    """A model in three parts, so that pipelines can cut it: embedder, equal blocks, head.

    `x` is any pytree of `[B, ...]` arrays. Weights that embedder and head share belong to the model itself. Every loss
    and metric is a `(sum, weight)` pair; the step divides, once, over the global batch. The weights depend on the batch
    only, never on parameters.

    A model may also have:
      `logits(x)`: the logits of the last block's output, of any number of positions, with which text can be generated.
      `flops_per_token(seq_len)`: the FLOPs of a training step per token, for MFU. Without it the matmuls with weights
        count, and nothing else; `Llama` adds those of attention.
      `width_multiplier`: its width over that of the model whose learning rate it shall use. AdamW and Lion divide the
        rate of matrices by it (muP, Yang et al. 2022, arXiv:2203.03466); the model does the rest, as `Llama` does.
      `size_options`: a class attribute, from logical axes to the options that are their sizes, where these do not have
        the usual names (`SIZE_OPTIONS` in `nn/sizes.py`): `{"embed": "hidden_size"}`. With it a config is checked
        against the mesh before anything is built.

    Attributes:
      blocks: the equal blocks.

    Example:
      >>> from shardtrain.models.mlp import MLP
      >>> isinstance(MLP(n_layers=2, d_model=4, d_ff=8, vocab_size=16, rngs=nnx.Rngs(0)), nn.Model)
      True
    """

    blocks: Stack

    def embedder(self, batch: Batch, ctx: Context) -> Any:
        """Turn the batch into the input of the first block."""

    def head(self, x: Any, batch: Batch, ctx: Context) -> Loss:
        """Turn the output of the last block into `(loss_sum, weight_sum, metrics)`."""


def forward(model: Model, batch: Batch, ctx: Context) -> tuple[Loss, Aux]:
    """Run the three parts in order.

    Args:
      model: a model in three parts.
      batch: the leaves of a batch, `[B, ...]` each.
      ctx: the context of that batch.

    Returns:
      The loss and metrics of the head, and the auxiliary terms of the blocks.

    Example:
      >>> from shardtrain.models.mlp import MLP
      >>> model = MLP(n_layers=2, d_model=4, d_ff=8, vocab_size=16, rngs=nnx.Rngs(0))
      >>> ids = jnp.zeros((2, 5), "i4")
      >>> batch = {"tokens": ids, "targets": ids, "loss_mask": jnp.ones((2, 5))}
      >>> (loss, weight, metrics), aux = nn.forward(model, batch, nn.Context(batch))
      >>> float(weight), sorted(metrics), aux
      (10.0, ['cross_entropy'], {})
    """
    x, aux = model.blocks(embedded(model, batch, ctx), ctx)
    sums = head_sums(model, x, batch, ctx)
    loss, weight = sums.pop("loss")
    return (loss, weight, sums), aux


def embedded(model: Model, batch: Batch, ctx: Context) -> Any:
    """Run the model's embedder on a batch, and check the result.

    Raises:
      UserError: the result is not a pytree of `[B, ...]` arrays.
    """
    x = model.embedder(batch, ctx)
    refuse_sown(model)  # type: ignore[arg-type]
    return checked_rows(f"{type(model).__name__}.embedder", x, jax.tree.leaves(dict(batch))[0].shape[0])


def head_sums(model: Model, x: Any, batch: Batch, ctx: Context) -> Sums:
    """Run the model's head on the last block's output, and check the result: the loss, as `loss`, and metrics.

    Raises:
      UserError: the result is not `(loss_sum, weight_sum, metrics)`, or the name of a metric is taken.
    """
    returned = model.head(x, batch, ctx)
    refuse_sown(model)  # type: ignore[arg-type]
    return checked_loss(f"{type(model).__name__}.head", returned)
