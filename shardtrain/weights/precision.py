"""The dtypes of a training step."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp

from shardtrain.errors import UserError

Matmul: TypeAlias = Literal["compute", "float8"]


def at_least_float32(dtype: Any) -> Any:
    """Return the dtype for softmaxes, losses, norms and angles of values in `dtype`."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def check_dtype(name: str, dtype: Any) -> None:
    """Refuse what JAX does not take for a dtype.

    Raises:
      UserError: it is none; names the argument.
    """
    try:
        jnp.dtype(dtype)
    except TypeError as error:
        rule = f"there is no such dtype: {error}"
        raise UserError(name, dtype, rule, "use one such as jnp.float32 or 'bfloat16'") from error


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of a training step.

    Attributes:
      params: dtype of the stored (master) weights and, with them, of the optimizer state.
      compute: dtype of activations, and of weights where they are used.
      reduce: dtype of weight gradients, from the matmul that makes them to their reduction over devices and
        microbatches.
      matmul: `compute`, or `float8` for the matmuls of the blocks (see `nn/float8.py`).

    Raises:
      UserError: there is no such dtype, or `matmul` is something else.

    Example:
      >>> nn.Precision(compute=jnp.bfloat16).softmax
      dtype('float32')
    """

    params: Any = jnp.float32
    compute: Any = jnp.float32
    reduce: Any = jnp.float32
    matmul: Matmul = "compute"

    def __post_init__(self) -> None:
        for name in ("params", "compute", "reduce"):
            check_dtype(f"precision.{name}", getattr(self, name))
        if self.matmul not in get_args(Matmul):
            raise UserError("precision.matmul", self.matmul, "must be compute or float8", "choose one of them")

    @property
    def softmax(self) -> Any:
        """The dtype of softmaxes and losses: at least float32, and never below the compute dtype."""
        return at_least_float32(self.compute)

    @property
    def gradient(self) -> Any:
        """The dtype in which the gradient of a weight is made: `reduce`, but float64 stays float64."""
        return self.compute if jnp.dtype(self.compute) == jnp.float64 else self.reduce
