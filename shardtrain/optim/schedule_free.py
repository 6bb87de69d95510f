"""Schedule-free optimizers, which need no decay of the learning rate (Defazio et al. 2024, arXiv:2405.15682).

They train at a point between a fast sequence and its average, and the average is what evaluates well:
`shardtrain.averaged` finds it. Optax's own factories decay all weights; these take a mask.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.errors import UserError
from shardtrain.weights.precision import at_least_float32


def schedule_free_adamw(
    learning_rate: optax.Schedule | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: Any = None,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Return `optax.contrib.schedule_free_adamw` whose decay has a mask."""
    scale = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    return _schedule_free(scale, learning_rate, b1, weight_decay, weight_lr_power, state_dtype, mask)


def schedule_free_sgd(
    learning_rate: optax.Schedule | float,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: Any = None,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Return `optax.contrib.schedule_free_sgd` whose decay has a mask."""
    scale = optax.identity()
    return _schedule_free(scale, learning_rate, b1, weight_decay, weight_lr_power, state_dtype, mask)


def check_average(type: str, weights: Any) -> None:
    """Refuse weights that are narrower than float32.

    The average is found from the weights and the fast sequence at each step, and changes less and less: rounding the
    weights to bfloat16 keeps it from moving.

    Raises:
      UserError: there is such a weight.
    """
    for weight in jax.tree.leaves(weights):
        if (dtype := jnp.dtype(weight.dtype)) != at_least_float32(dtype):
            rule = f"its average would be lost by rounding the weights to {dtype}"
            fix = "set precision.params to float32, or take another optimizer and ema.decay"
            raise UserError("optimizer.type", type, rule, fix)


def _schedule_free(
    scale: optax.GradientTransformation,
    lr: optax.Schedule | float,
    b1: float,
    weight_decay: float,
    power: float,
    dtype: Any,
    mask: Any,
) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(weight_decay, mask)
    base = optax.chain(scale, decay, optax.scale_by_learning_rate(lr))
    return optax.contrib.schedule_free(base, lr, b1=b1, weight_lr_power=power, state_dtype=dtype)
