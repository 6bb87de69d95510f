"""Sums of a batch before they become means: of losses, metrics, auxiliary terms and gradients.

A mean is one quotient over the global batch. Until then sums and their weights stay apart, so that they can be added
over microbatches and devices however many rows each of them has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import UserError, described
from shardtrain.nn.context import Context
from shardtrain.nn.losses import Loss
from shardtrain.nn.model import Batch
from shardtrain.nn.returned import Sums
from shardtrain.sharding import Partitioner
from shardtrain.weights.precision import at_least_float32
from shardtrain.weights.weight import Weight

Tree = Any

LossFunction = Callable[[nnx.Module, Batch, Context], Loss]
#: Adds a pytree over the devices that have rows of their own.
Total = Callable[[Any], Any]


def check_loss(loss: Any) -> None:
    """Refuse what cannot be called as a loss function.

    Raises:
      UserError: it is no function of three arguments.
    """
    shape = "a function (module, batch, ctx) -> (loss_sum, weight_sum, metrics)"
    if not callable(loss):
        raise UserError(f"loss is {described(loss)}, but must be {shape}")
    try:
        inspect.signature(loss).bind(None, None, None)
    except TypeError as error:
        raise UserError(f"loss cannot be called with (module, batch, ctx): {error}; it must be {shape}") from error
    except ValueError:  # one written in C has no signature
        pass


def row_axes(partitioner: Partitioner) -> tuple[str, ...]:
    """Mesh axes over which a manual region gives devices rows of their own, and adds up their results manually."""
    return tuple(axis for axis in ("island", "data") if partitioner.mesh.shape[axis] > 1)


def aux_scales(weights: Callable[[], tuple[jax.Array, dict[str, jax.Array]]], total: Total) -> dict[str, jax.Array]:
    """How much one unit of each auxiliary sum counts, in units of the loss sum: the ratio of their global weights.

    Gradients are divided by the loss's weight at the very end, while microbatches add up sums: so the ratio has to be
    known first.

    Args:
      weights: computes the weight of the loss and those of the auxiliary sums, of this region's rows, by a forward
        pass. They depend on the batch alone; the compiler drops the rest.
      total: adds them up over the devices that have rows of their own.
    """
    return weight_ratios(*weights(), total) if jax.eval_shape(weights)[1] else {}


def weight_ratios(weight: jax.Array, others: dict[str, jax.Array], total: Total) -> dict[str, jax.Array]:
    """The loss's weight over each of the others, all of them global; 0 for a term that is absent from the batch."""
    weight, others = total(jax.lax.stop_gradient((weight, others))) if others else (weight, {})
    return {name: jnp.where(w == 0, 0, weight / nonzero(w)) for name, w in others.items()}


def nonzero(weight: jax.Array) -> jax.Array:
    """A weight to divide by: 1 where it is 0, since its sum is then 0, too."""
    return jnp.where(weight == 0, jnp.ones_like(weight), weight)


def means(sums: Sums) -> dict[str, jax.Array]:
    """Each sum divided by its weight, 0 where that is 0; and the loss's own weight as `weight`."""
    return {name: value / nonzero(weight) for name, (value, weight) in sums.items()} | {"weight": sums["loss"][1]}


def widened(grads: Tree, weights: Tree, partitioner: Partitioner) -> Tree:
    """Gradients as they are added up: in at least float32, each sharded as its weight."""

    def one(grad: jax.Array, weight: Weight) -> jax.Array:
        return partitioner.constrain(grad.astype(at_least_float32(grad.dtype)), *weight.axes)

    return jax.tree.map(one, grads, weights)
