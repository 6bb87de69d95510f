"""Gradients of the global batch: microbatches, auxiliary terms, and one reduction over `data` at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from shardtrain.errors import UserError
from shardtrain.model_def import ModelDef, Tree, join_layers, split_layers
from shardtrain.nn.context import Context
from shardtrain.nn.losses import Loss
from shardtrain.nn.model import Batch, Model, forward
from shardtrain.nn.param import Weight
from shardtrain.parallel.gather import NONE, Gather, entry_spec, gathered, on_parts, split_dims, summed
from shardtrain.parallel.pipeline import pipeline_gradients
from shardtrain.parallel.slots import microbatch
from shardtrain.parallel.stages import pin
from shardtrain.sharding import Partitioner
from shardtrain.state import TrainState

LossFunction = Callable[[nnx.Module, Batch, Context], Loss]
#: name -> (sum, weight); always with "loss".
Sums = dict[str, tuple[jax.Array, jax.Array]]

#: Mesh axes over which gradients are reduced by hand, once per step.
_REDUCED = ("island", "data")


def batch_gradients(
    model: ModelDef,
    loss: LossFunction | None,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    partitioner: Partitioner,
    accumulate: int,
    reduce_dtype: Any,
    gather: Gather = "tick",
) -> tuple[Tree, Sums, Tree]:
    """Gradients of the mean loss over the global batch, the sums behind it, and the model's new state.

    The loss is `loss_sum / weight_sum` plus each auxiliary `sum / weight`, every quotient over the *global* batch.
    Microbatches run in a region that is manual over `data` and `island` (and `pipe`, for a pipeline): there each device
    group sums its own rows' gradients, and one reduction at the end adds them up. A pipeline that gathers weights once
    per step makes it manual over `fsdp` too. A batch in one piece is left to XLA, which reduces each gradient where it
    is made, beside the rest of the backward pass. So is a module with its own `loss`: what it does over the batch
    (BatchNorm) sees all of it.
    """
    pipe = [] if model.program is None else ["pipe"]
    whole = accumulate == 1 and not pipe
    by_hand = loss is None and not whole
    reduced = [axis for axis in _REDUCED if partitioner.mesh.shape[axis] > 1] if by_hand else []
    dims = jax.tree.map(lambda _: NONE, model.weights)  # that fsdp splits, as far as that is done by hand
    if gather == "step":
        dims, reduced = split_dims(model.weights, partitioner), [*reduced, "fsdp"]
    total = partial(jax.lax.psum, axis_name=reduced) if reduced else lambda x: x

    def total_gradients(grads: Tree) -> Tree:
        def one(grad: jax.Array, weight: Weight, dim: int) -> jax.Array:
            grad = summed(grad, reduced, reduce_dtype, dim)
            return grad if "stages" in weight.axes else summed(grad, pipe, jnp.float32)

        return jax.tree.map(one, grads, model.weights, dims)

    def local(params: Tree, model_state: Tree, batch: Batch) -> tuple[Tree, Sums, Tree]:
        if gather == "step":
            params = gathered(params, model.weights, dims, partitioner)
        if pipe:
            grads, sums = _pipelined(model, params, batch, key, partitioner, total)
            new_state = model_state
        else:
            grads, sums, new_state = _accumulated(
                model, loss, params, model_state, batch, key, partitioner, accumulate, total
            )
        if reduced or pipe:
            grads, sums = on_parts(total_gradients, model.weights, partitioner)(grads), total(sums)
        return grads, sums, new_state

    run = local
    if reduced or pipe:
        params_spec = jax.tree.map(entry_spec, model.weights, dims)
        run = jax.shard_map(
            local,
            mesh=partitioner.mesh,
            in_specs=(params_spec, PartitionSpec(), PartitionSpec(tuple(reduced) or None)),
            out_specs=(params_spec, PartitionSpec(), PartitionSpec()),
            axis_names={*reduced, *pipe},
            check_vma=False,  # other axes stay Auto (research/pipeline.md, sharp edge 3)
        )
    grads, sums, new_state = run(state.params, state.model_state, batch)
    if not whole:
        grads = jax.tree.map(lambda g: g / sums["loss"][1].astype(g.dtype), grads)
    return jax.tree.map(lambda g, w: g.astype(w.dtype), grads, model.weights), sums, new_state


def _accumulated(
    model: ModelDef,
    loss: LossFunction | None,
    params: Tree,
    model_state: Tree,
    batch: Batch,
    key: jax.Array,
    partitioner: Partitioner,
    accumulate: int,
    total: Callable[..., Any],
) -> tuple[Tree, Sums, Tree]:
    """Gradients of the summed loss over this region's rows, microbatch by microbatch; of the mean, if there is one."""
    weights = partial(_unpipelined_weights, model, loss, params, batch)
    scales = _aux_scales(weights, total) if accumulate > 1 else None  # a single batch's own forward pass tells them

    def gradient(batch: Batch, key: jax.Array) -> tuple[Tree, tuple[Sums, Tree]]:
        def objective(params: Tree) -> tuple[jax.Array, tuple[Sums, Tree]]:
            sums, aux, new_state = _sums(model, loss, params, model_state, batch, key, train=True)
            ratios = _ratios(sums["loss"][1], {n: w for n, (_, w) in aux.items()}, total) if scales is None else scales
            value = sums["loss"][0] + sum(s * ratios[name] for name, (s, _) in aux.items())
            if accumulate == 1:
                value = value / jax.lax.stop_gradient(sums["loss"][1])
            return value, (sums | aux, new_state)

        grads, rest = jax.grad(objective, has_aux=True)(params)
        return _kept(grads, model.weights, partitioner), rest

    if accumulate == 1:
        grads, (sums, new_state) = gradient(batch, key)
        return grads, sums, new_state
    micro = microbatches(batch, accumulate)

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        # Contract models draw their bits from row numbers; only a module's own streams need another key.
        grads, (sums, _) = gradient(microbatch(micro, index), key if loss is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    shapes = jax.eval_shape(lambda: gradient(microbatch(micro, 0), key))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], shapes[1][0]))
    zeros = (_kept(zeros[0], model.weights, partitioner), zeros[1])
    (grads, sums), _ = jax.lax.scan(body, zeros, jnp.arange(accumulate))
    return grads, sums, model_state


def _pipelined(
    model: ModelDef, params: Tree, batch: Batch, key: jax.Array, partitioner: Partitioner, total: Callable[..., Any]
) -> tuple[Tree, Sums]:
    """The same by a pipeline; within a region manual over `pipe`, where `params` holds this rank's layers."""
    assert model.program is not None
    assert model.layers_CRk is not None
    cut, ctx = model.cut(pin(partitioner, batch)), Context(inputs=batch, key=key, train=True)
    stacked, shared = split_layers(params)
    mine = jax.tree.map(lambda a: a[:, 0], stacked)  # [chunks, 1, k, ...]: the only rank here is this one

    def weights() -> tuple[jax.Array, dict[str, jax.Array]]:
        # All layers are alike, so one stands for all of them.
        x, aux = cut.block(jax.tree.map(lambda a: a[0, 0], mine), cut.embed(shared, batch, ctx), ctx)
        return cut.head(shared, x, batch, ctx)[1], {name: w * model.layout.n_layers for name, (_, w) in aux.items()}

    weights_stacked, weights_shared = split_layers(model.weights)
    of_rank = jax.tree.map(lambda w: dataclasses.replace(w, axes=(w.axes[0], *w.axes[2:])), weights_stacked)

    def keep(stacked: Tree, shared: Tree) -> tuple[Tree, Tree]:
        return _kept(stacked, of_rank, partitioner), _kept(shared, weights_shared, partitioner)

    dstacked, dshared, sums = pipeline_gradients(
        model.program,
        model.layers_CRk,
        cut,
        mine,
        shared,
        microbatches(batch, model.program.schedule.microbatches),
        ctx,
        _aux_scales(weights, total),
        keep,
        skip=model.idle == "skip",
    )
    return join_layers(jax.tree.map(lambda g: g[:, None], dstacked), dshared), sums


def _kept(grads: Tree, weights: Tree, partitioner: Partitioner) -> Tree:
    """Gradients in at least float32, each laid out as its weight."""

    def keep(grad: jax.Array, weight: Weight) -> jax.Array:
        return partitioner.constrain(grad.astype(jnp.promote_types(grad.dtype, jnp.float32)), *weight.axes)

    return jax.tree.map(keep, grads, weights)


def batch_sums(model: ModelDef, loss: LossFunction | None, state: TrainState, batch: Batch) -> Sums:
    """The evaluation sums of one batch, without a pipeline: loss, metrics and auxiliary terms."""
    sums, aux, _ = _sums(model, loss, state.params, state.model_state, batch, None, train=False)
    return sums | aux


def microbatches(batch: Batch, count: int) -> Batch:
    """`[B, ...]` leaves as `[B / count, count, ...]`: microbatch m is the rows `m::count`, so no row moves."""

    def split(a: jax.Array) -> jax.Array:
        if a.shape[0] % count:
            raise UserError(f"{a.shape[0]} rows do not divide into {count} microbatches; use a divisor of the rows")
        return a.reshape(a.shape[0] // count, count, *a.shape[1:])

    return jax.tree.map(split, batch)


def _sums(
    model: ModelDef,
    loss: LossFunction | None,
    params: Tree,
    model_state: Tree,
    batch: Batch,
    key: jax.Array | None,
    *,
    train: bool,
) -> tuple[Sums, Sums, Tree]:
    module = model.merge(params, model_state, key)
    ctx = Context(inputs=batch, key=key, train=train)
    if loss is None:
        (loss_sum, weight, metrics), aux = forward(cast(Model, module), batch, ctx)
    else:
        module.train() if train else module.eval()
        (loss_sum, weight, metrics), aux = loss(module, batch, ctx), {}
    return {"loss": (loss_sum, weight), **metrics}, aux, model.model_state(module)


def _unpipelined_weights(
    model: ModelDef, loss: LossFunction | None, params: Tree, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    if loss is not None:
        return jnp.ones(()), {}
    sums, aux, _ = _sums(model, None, params, {}, batch, None, train=False)
    return sums["loss"][1], {name: w for name, (_, w) in aux.items()}


def _aux_scales(
    weights: Callable[[], tuple[jax.Array, dict[str, jax.Array]]], total: Callable[..., Any]
) -> dict[str, jax.Array]:
    """How much one unit of each auxiliary sum counts beside one of the loss sum: ratio of their global weights.

    Gradients are divided by the loss's weight at the very end, while microbatches add up sums: so the ratio has to be
    known first. Weights depend on the batch alone; the compiler drops the rest of this forward pass.
    """
    return _ratios(*weights(), total) if jax.eval_shape(weights)[1] else {}


def _ratios(weight: jax.Array, others: dict[str, jax.Array], total: Callable[..., Any]) -> dict[str, jax.Array]:
    weight, others = total(jax.lax.stop_gradient((weight, others))) if others else (weight, {})
    return {name: weight / w for name, w in others.items()}
