"""Matmuls with sharded weights: gather the weight where it is used, scatter its gradient where it is kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.nn import float8
from shardtrain.nn.param import Initializer, Role, param
from shardtrain.nn.precision import Precision, at_least_float32
from shardtrain.sharding import current

Axes = tuple[str | None, ...]


def gathered(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """The weight as a matmul uses it: in the compute dtype, and whole along the mesh axes that split the batch.

    Saying so makes FSDP move weights (in the narrow dtype), never activations.
    """
    w = w.astype(dtype)
    partitioner = current()
    if partitioner is None:
        return w
    return partitioner.constrain(w, *axes, drop=_batch_axes(axes))


def scattered(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """The gradient of a weight as it is kept: in the parameter's dtype, split as the parameter is."""
    partitioner = current()
    return (w if partitioner is None else partitioner.constrain(w, *axes)).astype(dtype)


def _batch_axes(axes: Axes) -> tuple[str, ...]:
    partitioner = current()
    assert partitioner is not None
    own = partitioner.rules["experts"] if "experts" in axes else ()  # experts stay apart; their tokens travel
    return tuple(axis for axis in partitioner.rules["batch"] if axis not in own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def einsum(equation: str, x: jax.Array, w: jax.Array, axes: Axes, precision: Precision) -> jax.Array:
    """`jnp.einsum(equation, x, w)` for an activation `x` and a sharded weight `w` with logical `axes`.

    `w` comes in its stored dtype and layout and is gathered in `precision.compute`, again in the backward pass, so
    that no gathered copy stays alive. Its gradient is made and reduced over devices in `precision.gradient`.
    Every label of the equation stands in at least two of its three terms.
    """
    return _einsum_fwd(equation, x, w, axes, precision)[0]


def _product(
    equation: str, a: jax.Array, b: jax.Array, axes: Axes, precision: Precision, dtype: Any, *formats: Any
) -> jax.Array:
    """One matmul, in float8 where the policy says so; the vocabulary's always in the compute dtype."""
    if precision.matmul == "float8" and "vocab" not in axes:
        return float8.einsum(equation, a, b, formats, dtype)
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _einsum_fwd(
    equation: str, x: jax.Array, w: jax.Array, axes: Axes, precision: Precision
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Spelled out: a remat policy cannot look for matmuls inside of the custom_vjp itself.
    w_whole = gathered(w, axes, precision.compute)
    return _product(equation, x, w_whole, axes, precision, precision.compute, float8.E4M3, float8.E4M3), (x, w)


def _einsum_bwd(
    equation: str, axes: Axes, precision: Precision, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    inputs, out = equation.split("->")
    x_labels, w_labels = inputs.split(",")
    w_whole = gathered(w, axes, precision.compute)
    dx = _product(f"{out},{w_labels}->{x_labels}", dy, w_whole, axes, precision, x.dtype, float8.E5M2, float8.E4M3)
    dw = _product(f"{x_labels},{out}->{w_labels}", x, dy, axes, precision, precision.gradient, float8.E4M3, float8.E5M2)
    return dx, scattered(dw, axes, w.dtype)


einsum.defvjp(_einsum_fwd, _einsum_bwd)


def fan_in_normal(inputs: int, scale: float = 1.0) -> Initializer:
    """Truncated normal with variance `scale / fan_in`, fan-in counted over the first `inputs` dims (LeCun 1998)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        dims = tuple(range(inputs))
        rest = tuple(range(inputs, len(shape)))
        return jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", in_axis=dims, out_axis=rest)(
            key, shape, dtype
        )

    return init


class Linear(nnx.Module):
    """`y = einsum(equation, x, weight) + bias`: a dense layer over any dims, sharded by the logical axes of its weight.

    Args:
      equation: einsum of activation and weight, e.g. `"BSD,DHK->BSHK"`.
      shape: weight shape, contracted dims first.
      axes: logical axis of each weight dim.
      inputs: number of contracted dims.
      bias: add a bias over the output dims.
    """

    def __init__(
        self,
        equation: str,
        shape: Sequence[int],
        axes: Sequence[str | None],
        *,
        inputs: int = 1,
        bias: bool = False,
        role: Role = "matrix",
        init: Initializer | None = None,
        precision: Precision = Precision(),
        rngs: nnx.Rngs,
    ):
        self.equation, self.axes, self.precision = equation, tuple(axes), precision
        init = init or fan_in_normal(inputs)
        self.weight = param(rngs.params(), shape, axes, init, precision.params, role, inputs, precision.compute)
        zeros, kept = jax.nn.initializers.zeros, [None if a == "embed" else a for a in axes[inputs:]]
        self.bias = param(rngs.params(), shape[inputs:], kept, zeros, precision.params, "bias") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to `x`; the result has the compute dtype."""
        x = x.astype(self.precision.compute)
        y = einsum(self.equation, x, self.weight[...], self.axes, self.precision)
        if self.bias is None:
            return y
        wide = at_least_float32(y.dtype)  # the bias's gradient is a sum over all tokens
        return (y.astype(wide) + self.bias[...].astype(wide)).astype(y.dtype)
