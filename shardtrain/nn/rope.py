"""Rotary position embedding (Su et al. 2021) and its length extensions.

Shapes: B batch, S sequence, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import UserError
from shardtrain.weights.precision import at_least_float32

_KEYS = {
    "default": (set[str](), set[str]()),
    "linear": ({"factor"}, set[str]()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set[str]()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def rope_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> tuple[np.ndarray, float]:
    """Compute the angular frequency of each rotated pair, float64 `[head_dim / 2]`, and the factor on cos and sin.

    Args:
      head_dim: width of a head.
      theta: base of the frequencies.
      scaling: `None`, or a mapping with `type` (or `rope_type`) `linear` (Chen et al. 2023), `llama3` (Llama 3.1 model
        card) or `yarn` (Peng et al. 2023) and its numbers, named as in Hugging Face configs.

    Raises:
      UserError: the head dim is odd, the type is unknown, a key is missing or unknown, or `scaling` has another
        `rope_theta`.
    """
    if head_dim % 2:
        raise UserError(f"head_dim {head_dim} is odd, and rotary embedding rotates pairs; use an even head_dim")
    freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    options = dict(scaling or {})
    if (own := options.pop("rope_theta", theta)) != theta:
        raise UserError(f"rope_scaling.rope_theta is {own}, but rope_theta is {theta}; give it once, as rope_theta")
    older = options.pop("type", None)
    kind = options.pop("rope_type", older) or (None if options else "default")
    if kind not in _KEYS:
        raise UserError(
            f"rope_scaling.type {kind!r} is not one of {', '.join(_KEYS)}; choose one of them, or drop rope_scaling"
        )
    needed, optional = _KEYS[kind]
    if (missing := needed - options.keys()) or (unknown := options.keys() - needed - optional):
        problem = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown {', '.join(sorted(unknown))}"
        raise UserError(f"rope_scaling of type {kind} {problem}; it takes {', '.join(sorted(needed | optional))}")
    if kind == "default":
        return freq, 1.0
    if kind == "linear":
        return freq / options["factor"], 1.0
    return _llama3(freq, **options) if kind == "llama3" else _yarn(freq, head_dim, theta, **options)


def _llama3(
    freq: np.ndarray,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[np.ndarray, float]:
    turns = original_max_position_embeddings * freq / (2 * math.pi)  # full turns within the original context
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return freq * (keep + (1 - keep) / factor), 1.0


def _yarn(
    freq: np.ndarray,
    head_dim: int,
    theta: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[np.ndarray, float]:
    def pair_that_turns(n: float) -> float:
        return head_dim * math.log(original_max_position_embeddings / (n * 2 * math.pi)) / (2 * math.log(theta))

    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    stretch = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    if attention_factor is None:
        two = mscale and mscale_all_dim
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim) if two else magnitude(1.0)  # type: ignore[arg-type]
    return freq * ((1 - stretch) + stretch / factor), attention_factor


def rotate(x_BSHK: jax.Array, positions_BS: jax.Array, frequencies: Sequence[float], factor: float = 1.0) -> jax.Array:
    """Rotate pairs `(k, k + K/2)` of a head by `position * frequency`, in at least float32; keeps shape and dtype."""
    dtype = at_least_float32(x_BSHK.dtype)
    angle = positions_BS[:, :, None, None].astype(dtype) * jnp.asarray(frequencies, dtype)
    cos, sin = jnp.cos(angle) * jnp.asarray(factor, dtype), jnp.sin(angle) * jnp.asarray(factor, dtype)
    a, b = jnp.split(x_BSHK.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSHK.dtype)
