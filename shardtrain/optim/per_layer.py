"""Any optax transform, applied one layer at a time: each slice of a stacked weight is a separate weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.errors import UserError
from shardtrain.weights.layout import match_weights
from shardtrain.weights.weight import Weight


def slices(weights: Any) -> Any:
    """Return the weights of one layer, without any stack dims."""

    def one(w: Weight) -> Weight:
        return dataclasses.replace(w, shape=w.shape[w.stack :], axes=w.axes[w.stack :], stack=0)

    return jax.tree.map(one, weights)


def abstract(weights: Any) -> Any:
    """Return the params as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights)


def over_layers(
    tx: optax.GradientTransformation, weights: Any, group: Callable[[Weight], Hashable] | None = None
) -> optax.GradientTransformation:
    """Apply `tx`, made for `slices(weights)`, to stacked weights, by `vmap` over one stack dim after another.

    So dims that the mesh splits are never flattened together. The state of a stacked weight has the stack dims in
    front; state of no weight (a count) exists once.

    Args:
      tx: a transform in which no weight's update depends on another weight.
      weights: the stacked weights.
      group: weights of one group share a `vmap`; by default those with equal stack dims. `vmap` raises a ValueError
        on a transform that combines weights of different groups.
    """
    key: Callable[[Weight], Hashable] = group or (lambda w: w.shape[: w.stack])
    state = jax.eval_shape(tx.init, abstract(slices(weights)))
    init, update = tx.init, tx.update
    for name, stack in {key(w): w.stack for w in jax.tree.leaves(weights) if w.stack}.items():

        def axis(_: Any, weight: Weight | None, name: Hashable = name) -> int | None:
            return 0 if weight and weight.stack and key(weight) == name else None

        of_weights = jax.tree.map(axis, weights, weights)
        of_state = jax.tree.map(axis, state, match_weights(state, weights))
        for _ in range(stack):
            init = jax.vmap(init, in_axes=(of_weights,), out_axes=of_state)
            update = jax.vmap(update, in_axes=(of_weights, of_state, of_weights), out_axes=(of_weights, of_state))
    return optax.GradientTransformation(init, update)


def probe(name: str, tx: optax.GradientTransformation, weights: Any, apart: bool) -> None:
    """Trace an unknown transform, without arrays, to see that it works on these weights.

    Args:
      name: its name in errors.
      tx: made for `slices(weights)` if `apart`, else for `weights`.
      weights: the weights, a tree of `Weight`.
      apart: whether `over_layers` will be applied to it.

    Raises:
      UserError: it fails; or it cannot be applied to the layers of a stack separately.
    """
    params = abstract(weights)
    try:
        if apart:
            weights = jax.tree.map(dataclasses.replace, weights)  # distinct objects, so that each is its own group
            tx = over_layers(tx, weights, group=id)
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)
    except Exception as error:
        if not (apart and "out_axes" in str(error)):
            raise UserError(f"{name} fails on this model: {error}") from error
        raise UserError(
            f"{name} combines weights (in a global norm, say), so it cannot update the layers of a stack separately; "
            "set per_layer to false if a whole stacked weight may count as one"
        ) from error
    unmatched = jax.tree.map(lambda x, w: () if w else x, state, match_weights(state, weights))
    keys = [x for x in jax.tree.leaves(unmatched) if _is_key(x.dtype)]
    if apart and keys:
        raise UserError(
            f"{name} keeps a random key, which would draw the same noise for all layers of a stack; "
            "set per_layer to false"
        )


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
