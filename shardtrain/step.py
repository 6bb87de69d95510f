"""One optimizer update over the global batch, as a pure jitted function; and its evaluation twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.errors import UserError
from shardtrain.gradients import LossFunction, Sums, batch_gradients, batch_sums
from shardtrain.model_def import ModelDef
from shardtrain.nn.model import Batch
from shardtrain.sharding import Partitioner, use
from shardtrain.state import TrainState, abstract_state

Metrics = dict[str, jax.Array]


def make_train_step(
    model: ModelDef,
    tx: optax.GradientTransformation,
    partitioner: Partitioner,
    *,
    seed: int = 0,
    loss: LossFunction | None = None,
    accumulate: int = 1,
    reduce_dtype: Any = jnp.float32,
    lr: optax.Schedule | None = None,
) -> Any:
    """The jitted `(state, batch) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were and counts in
    `metrics["skipped"]` (total) and `metrics["skipped_in_row"]`.

    Args:
      loss: `(module, batch, ctx) -> (loss_sum, weight_sum, metrics)` for a module that does not follow `nn.Model`.
      accumulate: microbatches per step; microbatch m is the rows `m::accumulate`. The result is that of the full batch.
      reduce_dtype: dtype in which gradients cross the `data` and `island` axes; they are accumulated in float32.
      lr: the schedule, to report.

    Returns:
      A `jax.jit` function. Metrics are float32 scalars: `loss`, `grad_norm`, `weight` (the loss's normaliser), `lr`,
      and every metric and auxiliary term of the model, each divided by its own weight.

    Raises:
      UserError: `accumulate` > 1 for a pipeline, or for a module whose forward pass changes state; a `loss` for a
        pipeline; while tracing, rows that do not divide into the microbatches.
    """
    _check_loss(model, loss)
    if accumulate < 1:
        raise UserError(f"optimizer.accumulate is {accumulate}; use 1 or more microbatches")
    if accumulate > 1 and model.program is not None:
        raise UserError(
            f"optimizer.accumulate is {accumulate}, but a pipeline has microbatches of its own; use accumulate 1 and "
            "choose pipeline.microbatches"
        )
    if accumulate > 1 and model.mutable:
        raise UserError(
            f"optimizer.accumulate is {accumulate}, but the model changes {', '.join(model.mutable[:3])} in its "
            "forward pass, which would then depend on the microbatch; use accumulate 1"
        )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, partitioner))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use(partitioner):
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            grads, sums, model_state = batch_gradients(
                model, loss, state, batch, key, partitioner, accumulate, reduce_dtype
            )
            metrics = means(sums)
            metrics["grad_norm"] = optax.tree.norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

            def update(params: Any, opt_state: Any, _: Any) -> tuple[Any, Any, Any]:
                updates, opt_state = tx.update(grads, opt_state, params)
                return optax.apply_updates(params, updates), opt_state, model_state

            # A branch, not a choice per element: that would keep the old moments beside the new ones until the end.
            old = (state.params, state.opt_state, state.model_state)
            params, opt_state, model_state = jax.lax.cond(finite, update, lambda *old: old, *old)
            skipped = state.skipped + ~finite
            in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
            if lr is not None:
                metrics["lr"] = jnp.asarray(lr(state.step - state.skipped))
            metrics |= {"skipped": skipped, "skipped_in_row": in_row}
            return TrainState(state.step + 1, params, model_state, opt_state, skipped, in_row), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, partitioner.sharding(())))


def make_eval_step(model: ModelDef, partitioner: Partitioner, *, loss: LossFunction | None = None) -> Any:
    """The jitted `(state, batch) -> {name: (sum, weight)}`, without dropout and without gradients.

    Raises:
      UserError: a `loss` for a pipeline.
    """
    _check_loss(model, loss)

    def step(state: TrainState, batch: Batch) -> Sums:
        with use(partitioner):
            return batch_sums(model, loss, state, batch)

    return jax.jit(step, out_shardings=partitioner.sharding(()))


def _check_loss(model: ModelDef, loss: LossFunction | None) -> None:
    if loss is not None and model.program is not None:
        raise UserError(
            "a loss function of its own cannot be pipelined: only nn.Model's head can; drop loss, or the schedule"
        )


def evaluate(eval_step: Callable[[TrainState, Batch], Sums], state: TrainState, batches: Any) -> dict[str, float]:
    """Means over all batches of every sum that `eval_step` returns; `loss` among them."""
    total: Sums | None = None
    for batch in batches:
        # Fetched each time: at most one evaluation step is in flight.
        sums = jax.device_get(eval_step(state, batch))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    if total is None:
        raise UserError("evaluation got no batches; give the held-out split at least one global batch of rows")
    return {name: float(value / weight) for name, (value, weight) in total.items()}


def means(sums: Sums) -> Metrics:
    """Each sum divided by its weight, and the loss's own weight as `weight`."""
    return {name: value / weight for name, (value, weight) in sums.items()} | {"weight": sums["loss"][1]}
