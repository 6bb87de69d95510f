"""One optimizer update over the global batch, as a pure jitted function; and its evaluation twin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.collectives.fsdp import Gather, split_dims
from shardtrain.errors import UserError, described
from shardtrain.launch.cpu_collectives import ordered
from shardtrain.nn.model import Batch, Model
from shardtrain.nn.returned import Sums
from shardtrain.optim import Clipped, global_norm, updates_made
from shardtrain.pipeline.idle import AGREED, CheckedStep
from shardtrain.pipeline.layers import check_accumulate
from shardtrain.pipeline.schedules import bubble_warning
from shardtrain.sharding import Partitioner, use
from shardtrain.train.called import Step, check_batch
from shardtrain.train.gradients import batch_gradients
from shardtrain.train.ids import IdCheck
from shardtrain.train.loss_sums import LossFunction, batch_sums, means
from shardtrain.train.model_def import ModelDef
from shardtrain.train.pipelined import pipelined_sums
from shardtrain.train.state import TrainState, abstract_state, check_parts

_log = logging.getLogger(__name__)

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
    gather: Gather = "tick",
    compiler_options: Mapping[str, Any] | None = None,
    debug: bool = False,
) -> Any:
    """The jitted `(state, batch) -> (state, metrics)`; the state is donated.

    Warns where a pipeline has so few microbatches that its ranks idle for more than a quarter of the time.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were and counts in
    `metrics["skipped"]` (total) and `metrics["skipped_in_row"]`. A batch without a target that counts leaves them too,
    but is not counted there: its `loss` and `weight` are 0.

    Args:
      loss: `(module, batch, ctx) -> (loss_sum, weight_sum, metrics)` for a module that does not follow `nn.Model`.
      accumulate: microbatches per step; microbatch m is the rows `m::accumulate`. The result is that of the full batch.
      reduce_dtype: dtype in which gradients that were accumulated, in float32, cross the `data` and `island` axes.
        Without microbatches each crosses where it is made, in the model's own `Precision.reduce`.
      lr: the schedule, to report.
      gather: of a pipeline, whether the weights that fsdp splits are gathered in each tick, or once per `step`.
      compiler_options: for XLA; `shardtrain.launch.xla_flags.compiler_options` checks and completes them.
      debug: look for ids out of range in each batch first, and wait for that. See `IdCheck`, also for what it cannot
        see.

    Returns:
      A `Step`: a `jax.jit` function that explains mistakes. Metrics are scalars, float32 at least: `loss`,
      `grad_norm`, `weight` (the loss's normaliser), `lr`, and every metric and auxiliary term of the model, each
      divided by its own weight, 0 where that is 0.

    Raises:
      UserError: an argument of another kind; a schedule that does not fit the mesh; `accumulate` > 1 for a pipeline, or
        for a module whose forward pass changes state; a `loss` for a pipeline; a `gather` step that cannot be; `debug`
        of a model without a known table. While tracing: rows that do not divide into the microbatches, or what a part
        of the model or the loss returns is not what it should be. When compiled: idle ranks that cannot skip. When
        called: see `Step`.
    """
    _check(model, loss, partitioner)
    if accumulate < 1:
        raise UserError(f"optimizer.accumulate is {accumulate}; use 1 or more microbatches")
    if model.program is not None:
        check_accumulate(accumulate)
    if accumulate > 1 and model.mutable:
        raise UserError(
            f"optimizer.accumulate is {accumulate}, but the model changes {', '.join(model.mutable[:3])} in its "
            "forward pass, which would then depend on the microbatch; use accumulate 1"
        )
    if gather == "step":
        if model.program is None:
            raise UserError("gather step is for a pipeline, and the model has no schedule; drop it, or give a schedule")
        split_dims(model.weights, partitioner)
    if model.program is not None and (warning := bubble_warning(model.program.schedule)) and jax.process_index() == 0:
        _log.warning(warning)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, partitioner))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch, partitioner)
        with use(partitioner):
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            grads, sums, model_state = batch_gradients(
                model, loss, state, batch, key, partitioner, accumulate, reduce_dtype, gather
            )
            metrics = means(sums)
            metrics["grad_norm"] = global_norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            applied = finite & (metrics["weight"] != 0)

            def update(params: Any, opt_state: Any, _: Any) -> tuple[Any, Any, Any]:
                known = {"grad_norm": metrics["grad_norm"]} if isinstance(tx, Clipped) else {}
                updates, opt_state = tx.update(grads, opt_state, params, **known)
                return optax.apply_updates(params, updates), opt_state, model_state

            # A branch, not a choice per element: that would keep the old moments beside the new ones until the end.
            old = (state.params, state.opt_state, state.model_state)
            with jax.named_scope(AGREED):
                params, opt_state, model_state = jax.lax.cond(applied, update, lambda *old: old, *old)
            skipped = state.skipped + ~finite
            in_row = jnp.where(applied, 0, state.skipped_in_row + ~finite)
            if lr is not None:
                metrics["lr"] = jnp.asarray(lr(updates_made(state.opt_state, state.step - state.skipped)))
            metrics |= {"skipped": skipped, "skipped_in_row": in_row}
            return TrainState(state.step + 1, params, model_state, opt_state, skipped, in_row), metrics

    out = (shardings, partitioner.sharding(()))
    options = ordered(partitioner.devices, compiler_options)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)
    return _called(jitted, model, partitioner, debug)


def make_eval_step(
    model: ModelDef,
    partitioner: Partitioner,
    *,
    loss: LossFunction | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    debug: bool = False,
) -> Any:
    """The jitted `(state, batch) -> {name: (sum, weight)}`, without dropout and without gradients.

    Under a pipeline too each rank applies its own layers; rows that the schedule's microbatches do not divide go in
    fewer.

    Args and Raises: as for `make_train_step`.
    """
    _check(model, loss, partitioner)

    def step(state: TrainState, batch: Batch) -> Sums:
        check_batch(batch, partitioner)
        with use(partitioner):
            if model.program is not None:
                return pipelined_sums(model, state.params, batch, partitioner)
            return batch_sums(model, loss, state, batch)

    options = ordered(partitioner.devices, compiler_options)
    jitted = jax.jit(step, out_shardings=partitioner.sharding(()), compiler_options=options)
    return _called(jitted, model, partitioner, debug)


def _called(jitted: Any, model: ModelDef, partitioner: Partitioner, debug: bool) -> Step:
    checked = CheckedStep(jitted, partitioner.mesh) if model.idle == "skip" else jitted
    return Step(checked, partitioner.mesh, IdCheck(model) if debug else None)


def _check(model: ModelDef, loss: LossFunction | None, partitioner: Partitioner) -> None:
    check_parts(model, partitioner)
    if loss is None and not isinstance(module := model.outline({}), Model):
        raise UserError(
            f"{type(module).__name__} does not follow nn.Model (blocks, embedder, head); give make_train_step and "
            "make_eval_step a loss, a function (module, batch, ctx) -> (loss_sum, weight_sum, metrics)"
        )
    if loss is not None and not callable(loss):
        raise UserError(
            f"loss is {described(loss)}, but must be a function (module, batch, ctx) -> (loss_sum, weight_sum, metrics)"
        )
    if loss is not None and model.program is not None:
        raise UserError(
            "a loss function of its own cannot be pipelined: only nn.Model's head can; drop loss, or the schedule"
        )


def evaluate(eval_step: Callable[[TrainState, Batch], Sums], state: TrainState, batches: Any) -> dict[str, float]:
    """Means over all batches of every sum that `eval_step` returns; `loss` among them.

    A metric or an auxiliary term that weighs 0 in all batches together is left out.

    Raises:
      UserError: no batches, or a `Loader` that never ends; or none of their targets counts, so that there is no loss.
    """
    if getattr(batches, "endless", False):
        raise UserError(
            "evaluate got a Loader, which never ends; give the Loader epochs=1 (each row counts once), or the batches "
            "that you want: itertools.islice(loader, 20)"
        )
    total: Sums | None = None
    rows = 0
    for batch in batches:
        rows += jax.tree.leaves(batch)[0].shape[0]
        # Fetched each time: at most one evaluation step is in flight.
        sums = jax.device_get(jax.block_until_ready(eval_step(state, batch)))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    if total is None:
        raise UserError("evaluation got no batches; give the held-out split at least one global batch of rows")
    if total["loss"][1] == 0:
        raise UserError(
            f"evaluation has no loss: none of the targets in its {rows} rows counts, since loss_mask "
            "is 0 or the target negative everywhere; evaluate on rows with targets that count"
        )
    return {name: float(value / weight) for name, (value, weight) in total.items() if weight != 0}
