"""Buffers of slots, each of which holds a pytree, addressed by a traced index; -1 means no slot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def buffer(like: Tree, slots: int) -> Tree:
    """Make a buffer of `slots` slots for pytrees shaped like `like`, and one more slot that is never read."""
    return jax.tree.map(lambda a: jnp.zeros((slots + 1, *a.shape), a.dtype), like)


def zeros_like(shapes: Tree) -> Tree:
    """Make zeros of the shapes and dtypes of a pytree."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def read(slots: Tree, slot: jax.Array | int) -> Tree:
    """Read the slot with index `slot`; for -1, any value."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, jnp.maximum(slot, 0), 0, keepdims=False), slots)


def write(slots: Tree, slot: jax.Array, value: Tree) -> Tree:
    """Return the buffer with `value` in the slot with index `slot`; -1 is the slot that is never read."""

    def put(a: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(a, v.astype(a.dtype), jnp.where(slot < 0, a.shape[0] - 1, slot), 0)

    return jax.tree.map(put, slots, value)


def read_at(a: jax.Array, *index: jax.Array | int) -> jax.Array:
    """Read `a[index]`, where `index` addresses the first dims."""
    shape = a.shape[len(index) :]
    return jax.lax.dynamic_slice(a, _start(a, index), (*[1] * len(index), *shape)).reshape(shape)


def add_at(total: jax.Array, value: jax.Array, *index: jax.Array | int) -> jax.Array:
    """Add `value` to `total[index]`, where `index` addresses the first dims; in place where the compiler can."""
    value, start = value.astype(total.dtype).reshape(*[1] * len(index), *value.shape), _start(total, index)
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, value.shape) + value, start)


def _start(a: jax.Array, index: tuple[jax.Array | int, ...]) -> list[jax.Array]:
    return [jnp.asarray(i, jnp.int32) for i in (*index, *[0] * (a.ndim - len(index)))]


def select(which: jax.Array | np.bool_, a: Tree, b: Tree) -> Tree:
    """Choose, leaf by leaf, `a` if `which` holds, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(which, x, y), a, b)


def masked(active: jax.Array, tree: Tree) -> Tree:
    """Return the tree if `active` holds, else zeros, even where the tree holds NaN."""
    return jax.tree.map(lambda a: jnp.where(active, a, jnp.zeros_like(a)), tree)
