"""Clipping by the global norm of a gradient."""

from __future__ import annotations

from typing import Any

import jax
import optax

from shardtrain.weights.precision import at_least_float32


def global_norm(grads: Any) -> jax.Array:
    """Return the norm of all gradients together, computed in float32 at least, whatever their dtype."""
    return optax.tree.norm(jax.tree.map(_widened, grads))


def _widened(g: jax.Array) -> jax.Array:
    return g.astype(at_least_float32(g.dtype))


class Clipped(optax.GradientTransformationExtraArgs):
    """A transform that clips the gradient first. Its `update` accepts the `grad_norm` from a caller who knows it."""


def clipped(tx: optax.GradientTransformation, clip_norm: float) -> Clipped:
    """Return `optax.chain(optax.clip_by_global_norm(clip_norm), tx)`, without computing a norm twice.

    Clipping has no state, so the state of `tx` keeps its paths with or without it.
    """

    def update(grads: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = global_norm(grads) if grad_norm is None else grad_norm

        def clip(g: jax.Array) -> jax.Array:
            wide = _widened(g)
            clipped = jax.lax.select(norm < clip_norm, wide, (wide / norm.astype(wide.dtype)) * clip_norm)
            return clipped.astype(g.dtype)

        return tx.update(jax.tree.map(clip, grads), state, params)

    return Clipped(tx.init, update)
