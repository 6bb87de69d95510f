"""Buffers of slots: places for pytrees, addressed by a traced number; -1 for none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def buffer(like: Tree, slots: int) -> Tree:
    """`slots` places for a pytree of these shapes, and one more for what nobody reads."""
    return jax.tree.map(lambda a: jnp.zeros((slots + 1, *a.shape), a.dtype), like)


def zeros_like(shapes: Tree) -> Tree:
    """Zeros of these shapes and dtypes."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def read(slots: Tree, slot: jax.Array | int) -> Tree:
    """What lies in a slot; of none, anything."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, jnp.maximum(slot, 0), 0, keepdims=False), slots)


def write(slots: Tree, slot: jax.Array, value: Tree) -> Tree:
    """The buffer with a value in a slot."""

    def put(a: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(a, v.astype(a.dtype), jnp.where(slot < 0, a.shape[0] - 1, slot), 0)

    return jax.tree.map(put, slots, value)


def microbatch(batch_M: Tree, m: jax.Array | int) -> Tree:
    """One microbatch of leaves `[B / M, M, ...]`, in which the rows still lie as they did in `[B, ...]`."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, m, 1, keepdims=False), batch_M)


def read_at(a: jax.Array, *index: jax.Array | int) -> jax.Array:
    """What lies at the place `index` of the first dims."""
    shape = a.shape[len(index) :]
    return jax.lax.dynamic_slice(a, _start(a, index), (*[1] * len(index), *shape)).reshape(shape)


def add_at(total: jax.Array, value: jax.Array, *index: jax.Array | int) -> jax.Array:
    """`total` with `value` added at the place `index` of the first dims, without a copy where the compiler can."""
    value, start = value.astype(total.dtype).reshape(*[1] * len(index), *value.shape), _start(total, index)
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, value.shape) + value, start)


def _start(a: jax.Array, index: tuple[jax.Array | int, ...]) -> list[jax.Array]:
    return [jnp.asarray(i, jnp.int32) for i in (*index, *[0] * (a.ndim - len(index)))]


def select(which: jax.Array | np.bool_, a: Tree, b: Tree) -> Tree:
    """Leaf by leaf, `a` if `which` holds, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(which, x, y), a, b)


def masked(on: jax.Array, tree: Tree) -> Tree:
    """The tree if `on` holds, else zeros, whatever the tree holds (NaN too)."""
    return jax.tree.map(lambda a: jnp.where(on, a, jnp.zeros_like(a)), tree)
