"""What rows of a batch add up: sums behind a loss and its metrics, auxiliary terms beside it, gradients; microbatches.

A mean is one quotient over the global batch. Until then sums and their weights stay apart, so that they can be added
over microbatches and devices however many rows each of them has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.nn.context import Context
from shardtrain.nn.losses import Loss
from shardtrain.nn.model import Batch, Model, forward
from shardtrain.nn.returned import Sums, checked_loss, joined, refuse_sown
from shardtrain.sharding import Partitioner
from shardtrain.sharding.divide import check_microbatches
from shardtrain.train.model_def import ModelDef, Tree
from shardtrain.train.state import TrainState
from shardtrain.weights.weight import Weight

LossFunction = Callable[[nnx.Module, Batch, Context], Loss]
#: Adds a pytree over the devices that have rows of their own.
Total = Callable[[Any], Any]


def row_axes(partitioner: Partitioner) -> tuple[str, ...]:
    """Mesh axes over which a manual region gives devices rows of their own, and adds up by hand what they make."""
    return tuple(axis for axis in ("island", "data") if partitioner.mesh.shape[axis] > 1)


def model_sums(
    model: ModelDef,
    loss: LossFunction | None,
    params: Tree,
    model_state: Tree,
    batch: Batch,
    key: jax.Array | None,
    *,
    train: bool,
) -> tuple[Sums, Sums, Tree]:
    """One forward pass: the sums of loss and metrics, those of the auxiliary terms, and the model's new state.

    Raises:
      UserError: what a part of the model or the loss function returned is not what it should be.
    """
    module = model.merge(params, model_state, key)
    ctx = model.context(batch, key, train=train)
    if loss is None:
        (loss_sum, weight, metrics), aux = forward(cast(Model, module), batch, ctx)
    else:
        module.train() if train else module.eval()
        name = getattr(loss, "__name__", type(loss).__name__)
        returned, aux = loss(module, batch, ctx), {}
        refuse_sown(module)
        loss_sum, weight, metrics = checked_loss(f"the loss function {name}", returned)
    sums: Sums = {"loss": (loss_sum, weight), **metrics}
    return sums, aux, model.model_state(module)


def batch_sums(model: ModelDef, loss: LossFunction | None, state: TrainState, batch: Batch) -> Sums:
    """The evaluation sums of one batch, without a pipeline: loss, metrics and auxiliary terms."""
    sums, aux, _ = model_sums(model, loss, state.params, state.model_state, batch, None, train=False)
    return joined(sums, aux)


def aux_scales(weights: Callable[[], tuple[jax.Array, dict[str, jax.Array]]], total: Total) -> dict[str, jax.Array]:
    """How much one unit of each auxiliary sum counts beside one of the loss sum: the ratio of their global weights.

    Gradients are divided by the loss's weight at the very end, while microbatches add up sums: so the ratio has to be
    known first.

    Args:
      weights: computes the weight of the loss and those of the auxiliary sums, of this region's rows, by a forward
        pass. They depend on the batch alone; the compiler drops the rest.
    """
    return weight_ratios(*weights(), total) if jax.eval_shape(weights)[1] else {}


def weight_ratios(weight: jax.Array, others: dict[str, jax.Array], total: Total) -> dict[str, jax.Array]:
    """The loss's weight over each of the others, all of them global; 0 for a term of which the batch has nothing."""
    weight, others = total(jax.lax.stop_gradient((weight, others))) if others else (weight, {})
    return {name: jnp.where(w == 0, 0, weight / nonzero(w)) for name, w in others.items()}


def nonzero(weight: jax.Array) -> jax.Array:
    """A weight to divide by: 1 where it is 0, and so is what it belongs to."""
    return jnp.where(weight == 0, jnp.ones_like(weight), weight)


def means(sums: Sums) -> dict[str, jax.Array]:
    """Each sum divided by its weight, 0 where that is 0; and the loss's own weight as `weight`."""
    return {name: value / nonzero(weight) for name, (value, weight) in sums.items()} | {"weight": sums["loss"][1]}


def kept(grads: Tree, weights: Tree, partitioner: Partitioner) -> Tree:
    """Gradients as they are added up: in at least float32, each laid out as its weight."""

    def keep(grad: jax.Array, weight: Weight) -> jax.Array:
        return partitioner.constrain(grad.astype(jnp.promote_types(grad.dtype, jnp.float32)), *weight.axes)

    return jax.tree.map(keep, grads, weights)


def microbatches(batch: Batch, count: int, key: str = "optimizer.accumulate") -> Batch:
    """`[B, ...]` leaves as `[B / count, count, ...]`: microbatch m is the rows `m::count`, so no row moves.

    Raises:
      UserError: `count` does not divide the rows.
    """

    def split(a: jax.Array) -> jax.Array:
        check_microbatches(key, count, a.shape[0])
        return a.reshape(a.shape[0] // count, count, *a.shape[1:])

    return jax.tree.map(split, batch)
