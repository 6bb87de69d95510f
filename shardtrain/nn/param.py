"""Declaring a weight: shape, logical axes, initialiser and role on one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.weights.weight import Role, Weight

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def param(
    key: jax.Array,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: Initializer,
    dtype: Any,
    role: Role = "matrix",
    inputs: int = 0,
    compute: Any = None,
) -> nnx.Param:
    """Declare one weight: an `nnx.Param` of `shape` whose metadata says how it shards and how it trains.

    Args:
      key: random key of the initialiser.
      axes: one logical axis per dim; `None` keeps a dim whole on purpose.
      init: `(key, shape, dtype) -> array`, as in `jax.nn.initializers`.
      inputs: how many leading dims a matmul with the weight contracts.
      compute: dtype that the layer casts the weight to before anything else, so that it may travel in that.

    Raises:
      UserError: another number of axes than dims, or an unknown role.
    """
    if len(axes) != len(shape):
        raise UserError(f"a weight of shape {tuple(shape)} needs {len(shape)} logical axes, not {tuple(axes)}")
    if role not in get_args(Role):
        raise UserError(f"weight role {role!r} is none of {', '.join(get_args(Role))}")
    value = init(key, tuple(shape), dtype)
    return nnx.Param(value, axes=tuple(axes), role=role, inputs=inputs, stack=0, compute=compute)


def describe(variable: nnx.Variable) -> Weight:
    """The `Weight` of a variable, declared by `param` or by a plain Flax layer.

    Flax's own `nnx.with_partitioning(init, names)` is understood as logical axes. A variable without any is marked
    `annotated=False`; its role is guessed only from being a vector (`bias`) or not (`matrix`).
    """
    meta = variable.get_metadata()
    shape = tuple(variable.shape)
    stack = meta.get("stack", 0)
    names = meta.get("axes", meta.get("out_sharding"))
    vector = len(shape) - stack < 2
    return Weight(
        shape=shape,
        dtype=variable.dtype,
        axes=(None,) * len(shape) if names is None else tuple(names),
        role=meta.get("role", "bias" if vector else "matrix"),
        stack=stack,
        inputs=meta.get("inputs", 0 if vector else len(shape) - stack - 1),
        annotated=meta.get("annotated", names is not None),
        compute=meta.get("compute"),
    )


def stacked(variable: nnx.Variable, one: Weight) -> nnx.Variable:
    """Declare `variable`, a `[layers, ...]` stack of weights that are each like `one`."""
    return variable.replace(
        axes=("layers", *one.axes), role=one.role, inputs=one.inputs, stack=one.stack + 1, annotated=one.annotated
    )
