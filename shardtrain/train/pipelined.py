"""A batch through a pipeline, for gradients, sums or rows: each rank applies its own layers, whatever it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from shardtrain.collectives.fsdp import NONE, entry_spec
from shardtrain.nn.context import Context
from shardtrain.nn.model import Batch, head_sums
from shardtrain.nn.returned import Sums, joined
from shardtrain.pipeline.executor import pipeline_forward, pipeline_gradients
from shardtrain.pipeline.forward import Result
from shardtrain.pipeline.layers import pin
from shardtrain.pipeline.schedules import allocate, forward
from shardtrain.pipeline.stage import Work
from shardtrain.sharding import Partitioner
from shardtrain.train.loss_sums import Total, aux_scales, kept, microbatches, row_axes
from shardtrain.train.model_def import ModelDef, Tree, join_layers, split_layers


def pipelined_gradients(
    model: ModelDef, params: Tree, batch: Batch, key: jax.Array, partitioner: Partitioner, total: Total
) -> tuple[Tree, Sums]:
    """Gradients of the summed loss over this region's rows, and the sums behind it.

    To be called within a region manual over `pipe`, where `params` holds this rank's layers and, like them, the
    gradients of all others are this rank's share.
    """
    assert model.program is not None
    assert model.layers_CRk is not None
    work = _work(model, params, batch, partitioner, model.context(batch, key, train=True))

    def weights() -> tuple[jax.Array, dict[str, jax.Array]]:
        # All layers are alike, so one stands for all of them.
        cut, shared, ctx = work.cut, work.shared, work.ctx
        x, aux = cut.block(jax.tree.map(lambda a: a[0, 0], work.stacked), cut.embed(shared, batch, ctx), ctx)
        return cut.head(shared, x, batch, ctx)[1], {name: w * model.layout.n_layers for name, (_, w) in aux.items()}

    weights_stacked, weights_shared = split_layers(model.weights)
    of_rank = jax.tree.map(lambda w: dataclasses.replace(w, axes=(w.axes[0], *w.axes[2:])), weights_stacked)

    def keep(stacked: Tree, shared: Tree) -> tuple[Tree, Tree]:
        return kept(stacked, of_rank, partitioner), kept(shared, weights_shared, partitioner)

    dstacked, dshared, sums = pipeline_gradients(
        model.program,
        model.layers_CRk,
        dataclasses.replace(work, aux_scales=aux_scales(weights, total)),
        microbatches(batch, model.program.schedule.microbatches),
        keep,
    )
    return join_layers(jax.tree.map(lambda g: g[:, None], dstacked), dshared), sums


def pipelined_sums(model: ModelDef, params: Tree, batch: Batch, partitioner: Partitioner) -> Sums:
    """The evaluation sums of one batch: loss, metrics and auxiliary terms.

    Its rows go in as many microbatches as the schedule has or, where these do not divide a device's rows, in the most
    that do: the sums are the same.

    Raises:
      UserError: rows that do not divide over the mesh.
    """

    def sums(shared: Tree, y: Any, batch: Batch, ctx: Context) -> Sums:
        loss, weight, metrics = head_sums(model.outline(shared), y, batch, ctx)
        return {"loss": (loss, weight), **metrics}

    assert model.program is not None
    found, aux = _through(model, params, batch, partitioner, model.program.schedule.microbatches, sums, whole=True)
    return joined(found, aux)


def pipelined_rows(
    model: ModelDef, params: Tree, batch: Batch, partitioner: Partitioner, result: Callable[[Any, Any], jax.Array]
) -> jax.Array:
    """What `result(module, x)` makes of the last block's output `x`, `[B, ...]`, on all ranks.

    The batch goes as one microbatch. `result` may use all parameters of the module but those of its blocks.

    Raises:
      UserError: rows that do not divide over the mesh.
    """

    def rows(shared: Tree, y: Any, batch: Batch, ctx: Context) -> jax.Array:
        return result(model.outline(shared), y)

    return _through(model, params, batch, partitioner, 1, rows, whole=False)[0]


def _through(
    model: ModelDef, params: Tree, batch: Batch, partitioner: Partitioner, most: int, result: Result, *, whole: bool
) -> tuple[Any, Any]:
    """Results and auxiliary terms, summed over at most `most` microbatches.

    Args:
      whole: whether they are also summed over the rows of all devices; else the results of each device's rows are
        joined, and auxiliary terms, of which every device has its own, mean nothing.
    """
    assert model.program is not None
    schedule, layers_CRk = model.program.schedule, model.layers_CRk
    assert layers_CRk is not None
    for name, a in batch.items():
        partitioner.sharding(("batch", *[None] * (a.ndim - 1)), a.shape, f"batch[{name!r}]")  # checks the rows
    skip = whole and model.idle == "skip"  # generation does not check its program, so its idle ranks compute
    by_hand = row_axes(partitioner)

    def local(params: Tree, batch: Batch) -> tuple[Any, Any]:
        rows = jax.tree.leaves(batch)[0].shape[0] // partitioner.pieces("batch")
        count = next(m for m in range(min(most, rows), 0, -1) if rows % m == 0)
        work = dataclasses.replace(_work(model, params, batch, partitioner, model.context(batch)), skip=skip)
        found = pipeline_forward(
            allocate(forward(schedule, count)), layers_CRk, work, microbatches(batch, count), result
        )
        return jax.lax.psum(found, by_hand) if by_hand and whole else found

    rows = PartitionSpec(by_hand or None)
    return jax.shard_map(
        local,
        mesh=partitioner.mesh,
        in_specs=(jax.tree.map(partial(entry_spec, dim=NONE), model.weights), rows),
        out_specs=(PartitionSpec() if whole else rows, PartitionSpec()),
        axis_names={"pipe", *by_hand},
        check_vma=False,  # other axes stay Auto
    )(params, batch)


def _work(model: ModelDef, params: Tree, batch: Batch, partitioner: Partitioner, ctx: Context) -> Work:
    """What this rank does."""
    stacked, shared = split_layers(params)
    mine = jax.tree.map(lambda a: a[:, 0], stacked)  # [chunks, 1, k, ...]: the only rank here is this one
    return Work(model.cut(pin(partitioner, batch)), mine, shared, ctx, skip=model.idle == "skip")
