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
from shardtrain.parallel.pipeline import pipeline_gradients
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
) -> tuple[Tree, Sums, Tree]:
    """Gradients of the mean loss over the global batch, the sums behind it, and the model's new state.

    The loss is `loss_sum / weight_sum` plus each auxiliary `sum / weight`, every quotient over the *global* batch.
    Microbatches run in a region that is manual over `data` and `island` (and `pipe`, for a pipeline): there each device
    group sums its own rows' gradients, and one reduction at the end adds them up. A batch in one piece is left to XLA,
    which reduces each gradient where it is made, beside the rest of the backward pass. So is a module with its own
    `loss`: what it does over the batch (BatchNorm) sees all of it.
    """
    pipe = [] if model.program is None else ["pipe"]
    whole = accumulate == 1 and not pipe
    by_hand = loss is None and not whole
    reduced = [axis for axis in _REDUCED if partitioner.mesh.shape[axis] > 1] if by_hand else []
    total = partial(jax.lax.psum, axis_name=reduced) if reduced else lambda x: x

    def local(params: Tree, model_state: Tree, batch: Batch) -> tuple[Tree, Sums, Tree]:
        if pipe:
            grads, sums = _pipelined(model, params, batch, key, partitioner, total)
            new_state = model_state
        else:
            grads, sums, new_state = _accumulated(
                model, loss, params, model_state, batch, key, partitioner, accumulate, total
            )
        if reduced:
            grads = jax.tree.map(lambda g: total(g.astype(_reduced(g, reduce_dtype))).astype(g.dtype), grads)
            sums = total(sums)
        return grads, sums, new_state

    run = local
    if reduced or pipe:
        params_spec = jax.tree.map(lambda w: PartitionSpec(*(a and "pipe" for a in _stages(w))), model.weights)
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


def _stages(weight: Weight) -> tuple[bool, ...]:
    """Up to the dim that enumerates pipeline ranks, whether each dim is that one."""
    return tuple(axis == "stages" for axis in weight.axes[:2]) if "stages" in weight.axes else ()


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
    scales = _aux_scales(partial(_unpipelined_weights, model, loss, params, batch), total)

    def gradient(batch: Batch, key: jax.Array) -> tuple[Tree, tuple[Sums, Tree]]:
        def objective(params: Tree) -> tuple[jax.Array, tuple[Sums, Tree]]:
            sums, aux, new_state = _sums(model, loss, params, model_state, batch, key, train=True)
            value = sums["loss"][0] + sum(s * scales[name] for name, (s, _) in aux.items())
            if accumulate == 1:
                value = value / jax.lax.stop_gradient(sums["loss"][1])
            return value, (sums | aux, new_state)

        grads, rest = jax.grad(objective, has_aux=True)(params)
        return _kept(grads, model.weights, partitioner), rest

    if accumulate == 1:
        grads, (sums, new_state) = gradient(batch, key)
        return grads, sums, new_state
    micro = microbatches(batch, accumulate)

    def body(carry: Any, one: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        mb, index = one
        # Contract models draw their bits from row numbers; only a module's own streams need another key.
        grads, (sums, _) = gradient(mb, key if loss is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    shapes = jax.eval_shape(lambda: gradient(jax.tree.map(lambda a: a[0], micro), key))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], shapes[1][0]))
    zeros = (_kept(zeros[0], model.weights, partitioner), zeros[1])
    (grads, sums), _ = jax.lax.scan(body, zeros, (micro, jnp.arange(accumulate)))
    return grads, sums, model_state


def _pipelined(
    model: ModelDef, params: Tree, batch: Batch, key: jax.Array, partitioner: Partitioner, total: Callable[..., Any]
) -> tuple[Tree, Sums]:
    """The same by a pipeline; within a region manual over `pipe`, where `params` holds this rank's layers."""
    assert model.program is not None
    assert model.layers_CRk is not None
    length = batch["tokens"].shape[1] if "tokens" in batch else None

    def pin(x: Any) -> Any:
        def one(a: jax.Array) -> jax.Array:
            seq = "seq" if a.ndim > 2 and a.shape[1] == length else None
            return partitioner.constrain(a, "batch", *(seq if dim == 1 else None for dim in range(1, a.ndim)))

        return jax.tree.map(one, x)

    cut, ctx = model.cut(pin), Context(inputs=batch, key=key, train=True)
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
    )
    return join_layers(jax.tree.map(lambda g: g[:, None], dstacked), dshared), sums


def _kept(grads: Tree, weights: Tree, partitioner: Partitioner) -> Tree:
    """Gradients in at least float32, each laid out as its weight."""

    def keep(grad: jax.Array, weight: Weight) -> jax.Array:
        return partitioner.constrain(grad.astype(jnp.promote_types(grad.dtype, jnp.float32)), *weight.axes)

    return jax.tree.map(keep, grads, weights)


def batch_sums(model: ModelDef, loss: LossFunction | None, state: TrainState, batch: Batch) -> Sums:
    """The evaluation sums of one batch: loss, metrics and auxiliary terms."""
    sums, aux, _ = _sums(model, loss, state.params, state.model_state, batch, None, train=False)
    return sums | aux


def microbatches(batch: Batch, count: int) -> Batch:
    """`[B, ...]` leaves as `[count, B / count, ...]`: microbatch m is the rows `m::count`, so no row moves."""

    def split(a: jax.Array) -> jax.Array:
        if a.shape[0] % count:
            raise UserError(f"{a.shape[0]} rows do not divide into {count} microbatches; use a divisor of the rows")
        return jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1)

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
    if not jax.eval_shape(weights)[1]:
        return {}
    weight, others = total(weights())
    return {name: jax.lax.stop_gradient(weight / w) for name, w in others.items()}


def _reduced(grad: jax.Array, reduce_dtype: Any) -> Any:
    # float64 parameters are reduced in float64: the policy narrows gradients only below their own float32 sums.
    return reduce_dtype if grad.dtype == jnp.float32 else grad.dtype
