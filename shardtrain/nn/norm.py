"""Normalisation over the last dim, computed in at least float32."""

from __future__ import annotations

import functools

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
        return rms_norm(x, self.scale[...], self.eps, self.precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float, precision: Precision) -> jax.Array:
    """The function behind `RMSNorm`; its backward pass keeps `x` as it came, nothing in float32."""
    wide = x.astype(precision.softmax)
    return (wide * _inverse_rms(wide, eps) * scale.astype(wide.dtype)).astype(precision.compute)


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _rms_norm_bwd(
    eps: float, precision: Precision, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    wide, dy = x.astype(precision.softmax), dy.astype(precision.softmax)
    inverse = _inverse_rms(wide, eps)
    unit, slope = wide * inverse, dy * scale.astype(dy.dtype)
    dx = inverse * (slope - unit * jnp.mean(slope * unit, axis=-1, keepdims=True))
    dscale = jnp.sum(dy * unit, axis=tuple(range(dy.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(
    lambda x, scale, eps, precision: (rms_norm(x, scale, eps, precision), (x, scale)), _rms_norm_bwd
)


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
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        x = x * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)
        return x.astype(self.precision.compute)
