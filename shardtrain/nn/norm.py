"""Normalisation over the last dim, computed in at least float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.nn.param import param
from shardtrain.nn.precision import Precision

_ONES, _ZEROS = jax.nn.initializers.ones, jax.nn.initializers.zeros


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, precision: Precision = Precision(), rngs: nnx.Rngs):
        self.eps, self.precision = eps, precision
        self.scale = param(rngs.params(), (dim,), ("norm",), _ONES, precision.params, "norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` `[..., dim]`; the result has the compute dtype."""
        x = x.astype(self.precision.softmax)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(x.dtype)).astype(self.precision.compute)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` (Ba et al. 2016)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, precision: Precision = Precision(), rngs: nnx.Rngs):
        self.eps, self.precision = eps, precision
        self.scale = param(rngs.params(), (dim,), ("norm",), _ONES, precision.params, "norm")
        self.bias = param(rngs.params(), (dim,), ("norm",), _ZEROS, precision.params, "bias")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x` `[..., dim]`; the result has the compute dtype."""
        x = x.astype(self.precision.softmax)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = x * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)
        return x.astype(self.precision.compute)
