"""Gradients of the global batch: which devices make them from which rows, and where they are added up."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.collectives.fsdp import NONE, Gather, entry_spec, gathered, on_parts, split_dims, summed
from shardtrain.nn.model import Batch
from shardtrain.nn.returned import Sums, joined
from shardtrain.pipeline.slots import microbatch
from shardtrain.sharding import Partitioner
from shardtrain.train.loss_sums import (
    LossFunction,
    Total,
    aux_scales,
    kept,
    microbatches,
    model_sums,
    nonzero,
    row_axes,
    weight_ratios,
)
from shardtrain.train.model_def import ModelDef, Tree
from shardtrain.train.pipelined import pipelined_gradients
from shardtrain.train.state import TrainState
from shardtrain.weights.weight import Weight


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
    group sums its own rows' gradients, and one reduction at the end, in `reduce_dtype`, adds them up. A pipeline that
    gathers weights once per step makes it manual over `fsdp` too. A batch in one piece is left to XLA, which reduces
    each gradient where it is made, beside the rest of the backward pass, in the dtype that it is made in
    (`Precision.reduce`). So is a module with its own `loss`: what it does over the batch (BatchNorm) sees all of it.
    """
    pipe = [] if model.program is None else ["pipe"]
    whole = accumulate == 1 and not pipe
    reduced = [] if loss is not None or whole else [*row_axes(partitioner)]
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
            grads, sums = pipelined_gradients(model, params, batch, key, partitioner, total)
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
            check_vma=False,  # other axes stay Auto
        )
    grads, sums, new_state = run(state.params, state.model_state, batch)
    if not whole:
        weight = nonzero(sums["loss"][1])
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
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
    total: Total,
) -> tuple[Tree, Sums, Tree]:
    """Gradients of the summed loss over this region's rows, microbatch by microbatch; of the mean, if there is one."""

    def weights() -> tuple[jax.Array, dict[str, jax.Array]]:
        if loss is not None:
            return jnp.ones(()), {}
        sums, aux, _ = model_sums(model, None, params, {}, batch, None, train=False)
        return sums["loss"][1], {name: w for name, (_, w) in aux.items()}

    scales = aux_scales(weights, total) if accumulate > 1 else None  # a single batch's own forward pass tells them

    def gradient(batch: Batch, key: jax.Array) -> tuple[Tree, tuple[Sums, Tree]]:
        def objective(params: Tree) -> tuple[jax.Array, tuple[Sums, Tree]]:
            sums, aux, new_state = model_sums(model, loss, params, model_state, batch, key, train=True)
            value, weight = sums["loss"]
            ratios = weight_ratios(weight, {n: w for n, (_, w) in aux.items()}, total) if scales is None else scales
            value = value + sum(s * ratios[name] for name, (s, _) in aux.items())
            if accumulate == 1:
                value = value / nonzero(jax.lax.stop_gradient(weight))
            return value, (joined(sums, aux), new_state)

        grads, rest = jax.grad(objective, has_aux=True)(params)
        return kept(grads, model.weights, partitioner), rest

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
    zeros = (kept(zeros[0], model.weights, partitioner), zeros[1])
    (grads, sums), _ = jax.lax.scan(body, zeros, jnp.arange(accumulate))
    return grads, sums, model_state
