"""Matmuls in float8: operands are scaled by their current largest value, products accumulated in float32.

Forward operands are e4m3 (3 bits of mantissa), gradients e5m2 (more range), as in Micikevicius et al. 2022
(arXiv:2209.05433). Devices without float8 units (CPUs) emulate the same rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
#: Every magnitude below two to this power is within the format's range.
_TOP = {E4M3: 8, E5M2: 15}


def quantize(a: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return `a * scale` rounded to float8, and `1 / scale` (float32 scalar).

    The scale is the largest power of two that keeps all of `a` in range, so scaling itself does not round. Values that
    are not finite stay so.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(a)).astype(jnp.float32))
    shift = _TOP[dtype] - jnp.clip(exponent, -100, 128)
    one = jnp.ones((), jnp.float32)
    return (a.astype(jnp.float32) * jnp.ldexp(one, shift)).astype(dtype), jnp.ldexp(one, -shift)


def einsum(equation: str, a: jax.Array, b: jax.Array, formats: tuple[Any, Any], dtype: Any) -> jax.Array:
    """Compute `jnp.einsum(equation, a, b)` in `dtype`, with each operand first rounded to its float8 format.

    The scale of an operand is that of the whole tensor as this program sees it: a microbatch, and under data
    parallelism the rows of this group. So float8 results depend on the mesh, within float8's own rounding.
    """
    (a8, a_unit), (b8, b_unit) = quantize(a, formats[0]), quantize(b, formats[1])
    # HIGHEST keeps NVIDIA's tensor cores from using their short accumulator, which is not enough for gradients.
    exact = jax.lax.Precision.HIGHEST if E5M2 in formats else jax.lax.Precision.DEFAULT
    y = jnp.einsum(equation, a8, b8, preferred_element_type=dtype, precision=exact)
    return (y.astype(jnp.float32) * a_unit * b_unit).astype(dtype)
