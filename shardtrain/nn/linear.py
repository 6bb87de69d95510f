"""The dense layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.nn.matmul import Axes, einsums
from shardtrain.nn.param import Initializer, param
from shardtrain.weights.precision import Precision, at_least_float32
from shardtrain.weights.weight import Role


def fan_in_normal(inputs: int, scale: float = 1.0) -> Initializer:
    """Make a truncated normal with variance `scale / fan_in`, the fan-in being the first `inputs` dims (LeCun 1998)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        dims = tuple(range(inputs))
        rest = tuple(range(inputs, len(shape)))
        return jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", in_axis=dims, out_axis=rest)(
            key, shape, dtype
        )

    return init


def contracted(equation: str, axes: Axes) -> int:
    """The number of dims of a weight that its einsum contracts; they come first.

    Raises:
      UserError: the equation has another number of dims than the weight has axes, or contracts dims that do not come
        first.
    """
    inputs, _, out = equation.partition("->")
    labels = inputs.partition(",")[2]
    flags = [label not in out for label in labels]
    if len(labels) != len(axes) or flags != sorted(flags, reverse=True):
        raise UserError(
            f"the equation {equation!r} does not fit a weight with axes {axes}; its second term needs one letter per "
            "axis, those that the result lacks first, as in 'BSHK,HKD->BSD'"
        )
    return sum(flags)


class Linear(nnx.Module):
    """`y = einsum(equation, x, weight) + bias`: a dense layer over any dims, sharded by the logical axes of its weight.

    Args:
      equation: einsum of activation and weight, for example `"BSD,DHK->BSHK"`.
      shape: weight shape; the dims that the equation contracts come first.
      axes: logical axis of each weight dim.
      bias: add a bias over the output dims.
      role: see `Weight`.
      init: initialiser; default `fan_in_normal`.
      precision: dtypes.
      rngs: seeds of the weights.

    Raises:
      UserError: the equation does not fit the axes.

    Example:
      >>> layer = nn.Linear("BSD,DHK->BSHK", (8, 2, 4), ("embed", "heads", "head_dim"), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 5, 8))).shape
      (1, 5, 2, 4)
    """

    def __init__(
        self,
        equation: str,
        shape: Sequence[int],
        axes: Sequence[str | None],
        *,
        bias: bool = False,
        role: Role = "matrix",
        init: Initializer | None = None,
        precision: Precision = Precision(),
        rngs: nnx.Rngs,
    ):
        self.equation, self.axes, self.precision = equation, tuple(axes), precision
        inputs = contracted(equation, self.axes)
        init = init or fan_in_normal(inputs)
        self.weight = param(rngs.params(), shape, axes, init, precision.params, role, inputs, precision.compute)
        zeros, kept = jax.nn.initializers.zeros, [None if a == "embed" else a for a in axes[inputs:]]
        self.bias = param(rngs.params(), shape[inputs:], kept, zeros, precision.params, "bias") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiply `x` by the weight; the result has the compute dtype."""
        return together(x, self)[0]

    def _biased(self, y: jax.Array) -> jax.Array:
        if self.bias is None:
            return y
        wide = at_least_float32(y.dtype)  # the bias's gradient is a sum over all tokens
        return (y.astype(wide) + self.bias[...].astype(wide)).astype(y.dtype)


def together(x: jax.Array, *layers: Linear) -> tuple[jax.Array, ...]:
    """Apply several layers of one precision to the same `x`, so that its gradient is sent only once."""
    precision = layers[0].precision
    assert all(layer.precision == precision for layer in layers)
    equations, axes = tuple(layer.equation for layer in layers), tuple(layer.axes for layer in layers)
    ys = einsums(equations, x.astype(precision.compute), tuple(layer.weight[...] for layer in layers), axes, precision)
    return tuple(layer._biased(y) for layer, y in zip(layers, ys, strict=True))
