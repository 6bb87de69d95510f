"""Averages of the weights, which often evaluate better than the weights of the last step.

Either an exponential moving average beside the weights, `TrainState.ema`, or the average that a schedule-free optimizer
keeps (Defazio et al. 2024, arXiv:2405.15682).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import TrainState
from shardtrain.weights.precision import at_least_float32
from shardtrain.weights.trained import merged, trained


def start_ema(model: ModelDef, state: TrainState) -> TrainState:
    """The state with a moving average that starts from its weights, in float32 at least, sharded like them.

    Args:
      model: whose weights they are. Frozen ones need no average.
      state: live or as checkpoints store it.
    """
    part = trained(state.params, model.weights)
    return dataclasses.replace(state, ema=jax.tree.map(lambda p: jnp.array(p, at_least_float32(p.dtype)), part))


def averaged(model: ModelDef, state: TrainState) -> TrainState:
    """The state to evaluate or to sample from: with averaged weights in place of those of the last step.

    The moving average if the state has one, else the average of a schedule-free optimizer, else the state itself. The
    arrays of `state` stay as they are.

    Args:
      model: whose weights they are.
      state: of training, live.
    """
    part = trained(state.params, model.weights)
    average = state.ema if jax.tree.leaves(state.ema) else None
    if average is None and (found := _schedule_free(state.opt_state)) is not None:
        average = schedule_free_eval_params(found, part)
    if average is None:
        return state
    average = jax.tree.map(lambda a, p: a.astype(p.dtype), average, part)
    return dataclasses.replace(state, params=merged(average, state.params))


def keeps_average(opt_state: Any) -> bool:
    """Whether the state of an optimizer, of arrays or abstract, has an average of the weights for `averaged`."""
    return _schedule_free(opt_state) is not None


def _schedule_free(opt_state: Any) -> ScheduleFreeState | None:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ScheduleFreeState))
    return next((node for node in nodes if isinstance(node, ScheduleFreeState)), None)
