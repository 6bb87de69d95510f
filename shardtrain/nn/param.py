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
    """Declare one weight: an `nnx.Param` with metadata that says how it is sharded and how it trains.

    Args:
      key: random key of the initialiser.
      shape: sizes of the dims.
      axes: one logical axis per dim; `None` keeps a dim whole on purpose.
      init: `(key, shape, dtype) -> array`, as in `jax.nn.initializers`.
      dtype: dtype in which the weight is stored.
      role: purpose of the weight, see `Weight`.
      inputs: number of leading dims that a matmul with the weight contracts.
      compute: dtype that the layer casts the weight to before anything else, so that it may be sent in that.

    Raises:
      UserError: the number of axes is not that of dims, a dim is empty, or the role is unknown.

    Example:
      >>> zeros = jax.nn.initializers.zeros
      >>> weight = nn.param(jax.random.key(0), (4, 8), ("embed", "mlp"), zeros, jnp.float32, "matrix", inputs=1)
      >>> weight.shape, weight.axes
      ((4, 8), ('embed', 'mlp'))
    """
    if len(axes) != len(shape):
        raise UserError(f"a weight of shape {tuple(shape)} needs {len(shape)} logical axes, not {tuple(axes)}")
    if any(size < 1 for size in shape):
        raise UserError(f"a weight of shape {tuple(shape)} has no elements; give each of its dims {axes} 1 or more")
    if role not in get_args(Role):
        raise UserError(f"weight role {role!r} is not one of {', '.join(get_args(Role))}; choose one of them")
    value = init(key, tuple(shape), dtype)
    return nnx.Param(value, axes=tuple(axes), role=role, inputs=inputs, stack=0, compute=compute)


def describe(variable: nnx.Variable) -> Weight:
    """Return the `Weight` of a variable that `param` or a plain Flax layer declared.

    The names of Flax's own `nnx.with_partitioning(init, names)` are taken as logical axes. A variable without any is
    marked `annotated=False`, and its role is a guess: `bias` for a vector, else `matrix`.
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
