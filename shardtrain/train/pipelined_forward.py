"""The forward passes of a model under a pipeline: evaluation, and the generation of text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from shardtrain.collectives.fsdp import NONE, entry_spec
from shardtrain.nn.context import Context
from shardtrain.nn.model import Batch, head_sums
from shardtrain.nn.returned import Sums, joined
from shardtrain.nn.stack import constrain_residual
from shardtrain.pipeline.executor import pipeline_forward
from shardtrain.pipeline.extend import pipeline_extend
from shardtrain.pipeline.forward import OutputFunction
from shardtrain.pipeline.microbatches import microbatches
from shardtrain.pipeline.schedules import Program, allocate, forward
from shardtrain.pipeline.stage import StageFunctions
from shardtrain.sharding import Partitioner
from shardtrain.train.loss_sums import LossFunction, row_axes
from shardtrain.train.model_parts import model_parts, split_layers
from shardtrain.train.split_module import SplitModule, Tree

if TYPE_CHECKING:
    from shardtrain.train.state import TrainState


class PipelinedForward:
    """The half of `PipelinedModel` without gradients.

    Attributes:
      module: the model.
      program: schedule and buffers.
      layers_CRk: the layer in each slot, int32 `[chunks, ranks, k]`; -1 in empty slots.
      manual_axes: mesh axes over which gradients are always computed manually.
      weights: a `Weight` per parameter, as they live on the devices.
      skip: whether idle ranks skip their work.
    """

    manual_axes: tuple[str, ...] = ("pipe",)
    #: The logical axes of the dims before the batch in what layers keep of a text.
    kept_axes: tuple[str | None, ...] = (None, "stages", None)
    module: SplitModule
    program: Program
    layers_CRk: np.ndarray  # noqa: N815
    weights: Tree
    skip: bool

    def sums(self, state: TrainState, batch: Batch, partitioner: Partitioner, loss: LossFunction | None = None) -> Sums:
        """The evaluation sums of one batch: loss, metrics and auxiliary terms.

        The batch is cut into as many microbatches as the schedule has, or where the rows of a device are not a multiple
        of these, into the largest smaller number that divides them: the sums are the same.

        Raises:
          UserError: the number of rows is not a multiple of the devices that share them.
        """

        def sums(shared: Tree, y: Any, batch: Batch, ctx: Context) -> Sums:
            return head_sums(self.module.outline(shared), y, batch, ctx)

        most = self.program.schedule.microbatches
        return joined(*self._forward(state.params, batch, partitioner, most, sums, added=True))

    def outputs(
        self,
        params: Tree,
        model_state: Tree,
        batch: Batch,
        partitioner: Partitioner,
        result: Callable[[Any, Any], jax.Array],
    ) -> jax.Array:
        """`result(module, x)`, `[B, ...]`, for the output `x` of the last block, on all ranks.

        The batch is one microbatch. `result` may use all parameters of the module but those of its blocks.

        Raises:
          UserError: the number of rows is not a multiple of the devices that share them.
        """

        def rows(shared: Tree, y: Any, batch: Batch, ctx: Context) -> jax.Array:
            return result(self.module.outline(shared), y)

        return self._forward(params, batch, partitioner, 1, rows, added=False)[0]

    def extend(
        self,
        params: Tree,
        model_state: Tree,
        batch: Batch,
        past: Tree | None,
        partitioner: Partitioner,
        result: Callable[[Any, Any, Batch], jax.Array],
    ) -> tuple[jax.Array, Tree]:
        """See `UnpipelinedModel.extend`; `result` may use all parameters of the module but those of its blocks.

        Raises:
          UserError: the number of rows is not a multiple of the devices that share them.
        """
        program = allocate(forward(self.program.schedule, 1))

        def output(shared: Tree, y: Any, batch: Batch, ctx: Context) -> jax.Array:
            return result(self.module.outline(shared), y, batch)

        def local(params: Tree, batch: Batch, past: Tree | None) -> tuple[jax.Array, Tree]:
            stage = self._stage(params, batch, self.module.context(batch), skip=False)
            mine = jax.tree.map(lambda a: a[:, 0], past)  # as in `_stage`
            found, kept = pipeline_extend(program, self.layers_CRk, stage, batch, mine, output)
            return found, jax.tree.map(lambda a: a[:, None], kept)

        manual = row_axes(partitioner) or None
        rows, kept = PartitionSpec(manual), PartitionSpec(None, "pipe", None, manual)
        return self._mapped(local, partitioner, batch, (rows, kept), (rows, kept))(params, batch, past)

    def _forward(
        self, params: Tree, batch: Batch, partitioner: Partitioner, most: int, result: OutputFunction, *, added: bool
    ) -> tuple[Any, Any]:
        """Results and auxiliary terms, added up over at most `most` microbatches.

        Args:
          added: whether they are also added up over the rows of all devices; otherwise the results of each device's
            rows are concatenated, and the auxiliary terms, which every device has for its own rows, mean nothing.
        """
        skip = added and self.skip  # nothing checks the program of a generation, so its idle ranks compute
        manual = row_axes(partitioner)

        def local(params: Tree, batch: Batch) -> tuple[Any, Any]:
            rows = jax.tree.leaves(batch)[0].shape[0] // partitioner.shards("batch")
            count = next(m for m in range(min(most, rows), 0, -1) if rows % m == 0)
            stage = self._stage(params, batch, self.module.context(batch), skip=skip)
            program = allocate(forward(self.program.schedule, count))
            batch_M = microbatches(batch, count, "pipeline.microbatches")
            found = pipeline_forward(program, self.layers_CRk, stage, batch_M, result)
            return jax.lax.psum(found, manual) if manual and added else found

        rows = PartitionSpec(manual or None)
        out = (PartitionSpec() if added else rows, PartitionSpec())
        return self._mapped(local, partitioner, batch, (rows,), out)(params, batch)

    def _mapped(
        self, local: Callable[..., Any], partitioner: Partitioner, batch: Batch, ins: tuple[Any, ...], outs: Any
    ) -> Callable[..., Any]:
        """`local` on each rank, and on each device's own rows.

        Args:
          local: of the parameters, and of more.
          partitioner: the mesh and its rules.
          batch: whose rows the devices share.
          ins: specs of its arguments after the parameters.
          outs: specs of its results.
        """
        for name, a in batch.items():
            partitioner.sharding(("batch", *[None] * (a.ndim - 1)), a.shape, f"batch[{name!r}]")  # checks the rows
        return jax.shard_map(
            local,
            mesh=partitioner.mesh,
            in_specs=(jax.tree.map(partial(entry_spec, dim=NONE), self.weights), *ins),
            out_specs=outs,
            axis_names={*self.manual_axes, *row_axes(partitioner)},
            check_vma=False,  # other axes stay Auto, for which the check does not hold
        )

    def _stage(self, params: Tree, batch: Batch, ctx: Context, *, skip: bool) -> StageFunctions:
        """The functions and parameters of this rank's stages."""
        stacked, shared = split_layers(params)
        mine = jax.tree.map(lambda a: a[:, 0], stacked)  # [chunks, 1, k, ...]: the only rank here is this one
        parts = model_parts(self.module, partial(constrain_residual, inputs=batch))
        return StageFunctions(parts, mine, shared, ctx, skip=skip)
