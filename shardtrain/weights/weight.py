"""The declaration of a weight: shape, dtype, logical axes and role."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

Role = Literal["matrix", "embedding", "head", "norm", "bias", "router"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one weight, known before any array exists.

    Attributes:
      shape: sizes of its dims, stack dims included.
      dtype: dtype of the stored parameter.
      axes: the logical axis of each dim; `None` marks a dim that is deliberately not sharded.
      role: what the weight is for. Weight decay, muon and muP scales follow it, never `ndim`.
      stack: leading dims that enumerate equal layers (0, or 1 inside a `Stack`, or 3 under a pipeline).
      inputs: dims after the stack dims that a matmul contracts; all further dims are outputs.
      annotated: False for a parameter that came from a plain Flax layer without logical axes.
      compute: dtype to which its layer casts it before anything else; `None` if it does not, or does not say.
      lr_scale: factor of its learning rate, 1 / width for the matrices of a mu-parametrised model.
      trains: False for a frozen weight, which has no gradient and no optimizer state.

    Example:
      >>> weight = nn.Weight((8, 16), jnp.float32, ("embed", "mlp"), "matrix", inputs=1)
      >>> weight.input_dims, weight.output_dims, weight.size
      ((0,), (1,), 128)
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    role: Role
    stack: int = 0
    inputs: int = 0
    annotated: bool = True
    compute: Any = None
    lr_scale: float = 1.0
    trains: bool = True

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
