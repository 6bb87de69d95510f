"""Declaring a weight: shape, logical axes, initialiser and role on one line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import UserError

Role = Literal["matrix", "embedding", "head", "norm", "bias", "router"]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Weight:
    """What is known of one weight before any array exists.

    Attributes:
      shape: sizes of its dims, stack dims included.
      dtype: dtype of the stored parameter.
      axes: the logical axis of each dim; `None` marks a dim that is deliberately not sharded.
      role: what the weight is for. Weight decay, muon and muP scales follow it, never `ndim`.
      stack: leading dims that enumerate equal layers (0, or 1 inside a `Stack`, or 3 under a pipeline).
      inputs: dims after the stack dims that a matmul contracts; all further dims are outputs.
      annotated: False for a parameter that came from a plain Flax layer without logical axes.
      compute: dtype that its layer casts it to before anything else; `None` where it does not, or does not say.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    role: Role
    stack: int = 0
    inputs: int = 0
    annotated: bool = True
    compute: Any = None

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Indices of the dims that a matmul with this weight contracts."""
        return tuple(range(self.stack, self.stack + self.inputs))

    @property
    def output_dims(self) -> tuple[int, ...]:
        """Indices of the dims that a matmul with this weight produces."""
        return tuple(range(self.stack + self.inputs, len(self.shape)))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parameter."""
        return self.size * jnp.dtype(self.dtype).itemsize


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
