"""One optimizer update over the global batch, as a pure jitted function; and the evaluation step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.collectives.fsdp import Gather
from shardtrain.errors import UserError
from shardtrain.host.typed import typed
from shardtrain.launch.cpu_collectives import ordered
from shardtrain.nn.model import Batch, Model
from shardtrain.nn.returned import Sums
from shardtrain.optim import Clipped, global_norm, updates_made
from shardtrain.optim.ema import check_decay, next_ema
from shardtrain.pipeline.idle import UNIFORM
from shardtrain.sharding import Partitioner, use
from shardtrain.train.gradients import Gradients
from shardtrain.train.ids import IdCheck
from shardtrain.train.jitted_step import JittedStep, Metrics, check_batch
from shardtrain.train.loss_sums import LossFunction, check_loss, means
from shardtrain.train.model_def import ModelDef
from shardtrain.train.norms import norms_each
from shardtrain.train.split_module import Tree
from shardtrain.train.state import TrainState, abstract_state, check_parts
from shardtrain.weights.precision import check_dtype
from shardtrain.weights.trained import merged, trained

_log = logging.getLogger(__name__)


@typed
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
    ema: float | None = None,
    norms_every: int | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    debug: bool = False,
) -> JittedStep[tuple[TrainState, Metrics]]:
    """The jitted `(state, batch) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient is not finite changes no weight, and counts in `metrics["skipped"]` (total) and
    `metrics["skipped_in_row"]`. A batch without a target changes none either; its `loss` and `weight` are 0.

    Args:
      model: the definition of the model.
      tx: the optimizer.
      partitioner: the mesh and its rules.
      seed: of dropout.
      loss: `(module, batch, ctx) -> (loss_sum, weight_sum, metrics)` for a module that does not follow `nn.Model`.
      accumulate: microbatches per step; microbatch m is the rows `m::accumulate`. The result is that of the full batch.
      reduce_dtype: of accumulated float32 gradients where they cross the `data` and `island` axes. Without microbatches
        each crosses where it is computed, in the model's own `Precision.reduce`.
      lr: the schedule, to report.
      gather: for a pipeline, whether the weights that fsdp splits are gathered in each `tick`, or once per `step`.
      ema: the decay of a moving average of the weights, for a state of `start_ema`; see `next_ema`.
      norms_every: steps from one `metrics["norms"]` to the next, see `shardtrain.train.norms`; between, they are zeros.
      compiler_options: for XLA; `shardtrain.launch.xla_flags.compiler_options` checks and completes them.
      debug: look for ids out of range in each batch first, and wait for the result. See `IdCheck`, also for its limits.

    Returns:
      A jitted function. Metrics are scalars, float32 at least: `loss`, `grad_norm`, `weight` (the loss's normaliser),
      `lr`, and every metric and auxiliary term of the model, each divided by its own weight, 0 where that is 0.

    Raises:
      UserError: an argument of another kind, or options that the model or the mesh cannot have. While tracing: rows not
        divisible by the microbatches, or wrong results of a part of the model. When called: see `JittedStep`.
    """
    _check(model, loss, partitioner, accumulate, gather, ema, reduce_dtype)
    _warn(model)
    gradients = Gradients(model, partitioner, loss, accumulate, reduce_dtype, gather)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch, partitioner)
        _check_ema(state, ema)
        with use(partitioner):
            grads, sums, model_state = gradients(state, batch, jax.random.fold_in(jax.random.key(seed), state.step))
            metrics = means(sums) | {"grad_norm": global_norm(grads)}
            new_state, metrics = _updated(state, grads, model_state, metrics, tx, lr, model.weights, ema)
            return new_state, metrics | norms_each(norms_every, new_state.step, model, grads, state.params)

    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, partitioner, ema=ema is not None))
    return _jitted(step, model, partitioner, (layout, partitioner.sharding(())), compiler_options, debug, donate=True)


def _warn(model: ModelDef) -> None:
    if (warning := model.execution.warning()) and jax.process_index() == 0:
        _log.warning(warning)


def _updated(
    state: TrainState,
    grads: Tree,
    model_state: Tree,
    metrics: Metrics,
    tx: optax.GradientTransformation,
    lr: optax.Schedule | None,
    weights: Tree,
    decay: float | None,
) -> tuple[TrainState, Metrics]:
    """The state after an update, or with the old weights if the update must not be applied; and all metrics."""
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    applied = finite & (metrics["weight"] != 0)

    def update(params: Tree, opt_state: Any, _: Tree, ema: Tree) -> tuple[Tree, Any, Tree, Tree]:
        part = trained(params, weights)
        known = {"grad_norm": metrics["grad_norm"]} if isinstance(tx, Clipped) else {}
        updates, opt_state = tx.update(grads, opt_state, part, **known)
        part = optax.apply_updates(part, updates)
        if decay is not None:
            ema = next_ema(ema, part, state.step, decay)
        return merged(part, params), opt_state, model_state, ema

    # One branch for the whole state: `jnp.where` leaf by leaf would hold old and new moments until the end of the step.
    old = (state.params, state.opt_state, state.model_state, state.ema)
    with jax.named_scope(UNIFORM):  # all devices take the same branch, so it may hold collectives
        params, opt_state, model_state, ema = jax.lax.cond(applied, update, lambda *old: old, *old)
    skipped = state.skipped + ~finite
    in_row = jnp.where(applied, 0, state.skipped_in_row + ~finite)
    if lr is not None:
        metrics["lr"] = jnp.asarray(lr(updates_made(state.opt_state, state.step - state.skipped)))
    metrics |= {"skipped": skipped, "skipped_in_row": in_row}
    return TrainState(state.step + 1, params, model_state, opt_state, skipped, in_row, ema), metrics


def make_eval_step(
    model: ModelDef,
    partitioner: Partitioner,
    *,
    loss: LossFunction | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    debug: bool = False,
) -> JittedStep[Sums]:
    """The jitted `(state, batch) -> {name: (sum, weight)}`, without dropout and without gradients.

    Under a pipeline, too, each rank applies its own layers; where the rows are not divisible by the schedule's
    microbatches, there are fewer microbatches.

    The arguments and the mistakes that are refused are those of `make_train_step`. The sums are scalars.
    """
    _check(model, loss, partitioner)

    def step(state: TrainState, batch: Batch) -> Sums:
        check_batch(batch, partitioner)
        with use(partitioner):
            return model.execution.sums(state, batch, partitioner, loss)

    return _jitted(step, model, partitioner, partitioner.sharding(()), compiler_options, debug)


def _check_ema(state: TrainState, decay: float | None) -> None:
    """Refuse a state with an average for a step that keeps none, and the other way round."""
    if (decay is not None) != bool(jax.tree.leaves(state.ema)):
        has, wants = ("has no", "keeps") if decay is not None else ("has an", "does not keep")
        raise UserError(
            f"the state {has} average of the weights (ema), and this step {wants} one; use start_ema(model, state) and "
            "make_train_step(ema=...) together, or neither"
        )


def _jitted(
    step: Callable[[TrainState, Batch], Any],
    model: ModelDef,
    partitioner: Partitioner,
    out: Any,
    compiler_options: Mapping[str, Any] | None,
    debug: bool,
    donate: bool = False,
) -> JittedStep[Any]:
    """The step under jit, checked before its first call; `out` are the shardings of its results."""
    options = ordered(partitioner.devices, compiler_options)
    jitted = jax.jit(step, donate_argnums=0 if donate else (), out_shardings=out, compiler_options=options)
    checked = model.execution.checked(jitted, partitioner.mesh)
    return JittedStep(checked, partitioner.mesh, IdCheck(model) if debug else None)


def _check(
    model: ModelDef,
    loss: LossFunction | None,
    partitioner: Partitioner,
    accumulate: int = 1,
    gather: Gather = "tick",
    ema: float | None = None,
    reduce_dtype: Any = jnp.float32,
) -> None:
    check_parts(model, partitioner)
    check_decay(ema)
    check_dtype("reduce_dtype", reduce_dtype)
    if loss is None and not isinstance(module := model.outline({}), Model):
        raise UserError(
            f"{type(module).__name__} does not follow nn.Model (blocks, embedder, head); give make_train_step and "
            "make_eval_step a loss, a function (module, batch, ctx) -> (loss_sum, weight_sum, metrics)"
        )
    if loss is not None:
        check_loss(loss)
    if accumulate < 1:
        raise UserError(f"optimizer.accumulate is {accumulate}; use 1 or more microbatches")
    model.execution.check_step(partitioner, loss, accumulate, gather)
