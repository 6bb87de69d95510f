"""The norms of gradients and weights, layer by layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.pipeline.idle import UNIFORM
from shardtrain.train.model_def import ModelDef
from shardtrain.train.split_module import Tree
from shardtrain.weights.paths import flatten
from shardtrain.weights.precision import at_least_float32
from shardtrain.weights.trained import trained
from shardtrain.weights.weight import Weight


def norms_each(every: int | None, step: jax.Array, model: ModelDef, grads: Tree, params: Tree) -> dict[str, Any]:
    """`{"norms": layer_norms(...)}`, or zeros, for which nothing is computed; without `every` not even these.

    Args:
      every: steps from one computation to the next.
      step: the number of the present one, from 1.
      model: the definition of the model.
      grads: gradients of its weights, as they live on the devices.
      params: the weights before the update.
    """
    if every is None:
        return {}

    def now() -> dict[str, jax.Array]:
        return layer_norms(model, grads, params)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(now))
    with jax.named_scope(UNIFORM):  # all devices take the same branch, so it may hold collectives
        return {"norms": jax.lax.cond(step % every == 0, now, lambda: zeros)}


def layer_norms(model: ModelDef, grads: Tree, params: Tree) -> dict[str, jax.Array]:
    """`grad_norms/<path>` and `weight_norms/<path>`, float32 at least: scalars, or `[layers]` for those of a stack."""

    def norm(a: jax.Array, weight: Weight) -> jax.Array:
        wide = a.astype(at_least_float32(a.dtype))
        return jnp.sqrt(jnp.square(wide).sum(tuple(range(weight.stack, a.ndim))))

    found: dict[str, jax.Array] = {}
    training = trained(model.weights, model.weights)
    for name, tree, weights in (("grad_norms", grads, training), ("weight_norms", params, model.weights)):
        norms = model.canonical(jax.tree.map(norm, tree, weights))
        found |= {f"{name}/{path}": value for path, value in flatten(norms).items()}
    return found


def by_layer(norms: dict[str, Any]) -> dict[str, float]:
    """Norms that have arrived on the host, with a name of their own for each layer: `grad_norms/blocks.w/3`."""
    values: dict[str, float] = {}
    for name, array in norms.items():
        host = np.asarray(array)
        values |= {name: float(host)} if host.ndim == 0 else {f"{name}/{i}": float(x) for i, x in enumerate(host)}
    return values
