"""Normalisation over the last dim, computed in at least float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.host.typed import typed
from shardtrain.nn.param import param
from shardtrain.nn.ranges import check_epsilon
from shardtrain.weights.precision import Precision

#: For the backward pass a norm keeps its input in its own dtype, and nothing in float32.
_recomputed = partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
_ONES, _ZEROS = jax.nn.initializers.ones, jax.nn.initializers.zeros


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` (Zhang & Sennrich 2019).

    Args:
      dim: size of the last dim.
      eps: added to the mean square.
      precision: dtypes.
      rngs: seeds of the weights.

    Raises:
      UserError: `eps` is negative.

    Example:
      >>> norm = nn.RMSNorm(4, rngs=nnx.Rngs(0))
      >>> norm(jnp.full((1, 4), 3.0)).round(3).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """

    @typed
    def __init__(self, dim: int, *, eps: float = 1e-5, precision: Precision = Precision(), rngs: nnx.Rngs):
        check_epsilon(eps)
        self.eps, self.precision = eps, precision
        self.scale = param(rngs.params(), (dim,), ("norm",), _ONES, precision.params, "norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` `[..., dim]`; the result has the compute dtype."""

        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            x = x.astype(self.precision.softmax)
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
            return (x * scale.astype(x.dtype)).astype(self.precision.compute)

        return _recomputed(norm)(x, self.scale[...])


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` (Ba et al. 2016).

    Args:
      dim: size of the last dim.
      eps: added to the variance.
      precision: dtypes.
      rngs: seeds of the weights.

    Raises:
      UserError: `eps` is negative.

    Example:
      >>> norm = nn.LayerNorm(2, rngs=nnx.Rngs(0))
      >>> norm(jnp.array([[1.0, 3.0]])).round(3).tolist()
      [[-1.0, 1.0]]
    """

    @typed
    def __init__(self, dim: int, *, eps: float = 1e-5, precision: Precision = Precision(), rngs: nnx.Rngs):
        check_epsilon(eps)
        self.eps, self.precision = eps, precision
        self.scale = param(rngs.params(), (dim,), ("norm",), _ONES, precision.params, "norm")
        self.bias = param(rngs.params(), (dim,), ("norm",), _ZEROS, precision.params, "bias")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` `[..., dim]`; the result has the compute dtype."""

        def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            x = x.astype(self.precision.softmax)
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
            return (x * scale.astype(x.dtype) + bias.astype(x.dtype)).astype(self.precision.compute)

        return _recomputed(norm)(x, self.scale[...], self.bias[...])
