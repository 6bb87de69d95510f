"""A model under a pipeline: each rank of the mesh axis `pipe` applies the layers of its own stages."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from shardtrain.collectives.fsdp import Gather, split_dims
from shardtrain.errors import UserError
from shardtrain.nn.model import Batch
from shardtrain.nn.returned import Sums
from shardtrain.nn.stack import Stack
from shardtrain.pipeline.executor import pipeline_gradients
from shardtrain.pipeline.idle import CheckedStep
from shardtrain.pipeline.layers import check_accumulate, check_ranks, layer_table
from shardtrain.pipeline.microbatches import microbatches
from shardtrain.pipeline.phases import BackwardName, check_backward
from shardtrain.pipeline.schedules import Schedule, allocate, bubble_warning, check_trains, simulate
from shardtrain.sharding import Partitioner
from shardtrain.train.loss_sums import LossFunction, aux_scales, widened
from shardtrain.train.model_parts import join_layers, split_layers
from shardtrain.train.pipelined_forward import PipelinedForward
from shardtrain.train.split_module import SplitModule, Tree
from shardtrain.weights.layout import Layout
from shardtrain.weights.trained import trained

if TYPE_CHECKING:
    from shardtrain.train.gradients import Gradients


class PipelinedModel(PipelinedForward):
    """A model whose layers are cut into stages. It has the methods of `UnpipelinedModel`.

    Args:
      module: the model.
      schedule: says which rank computes which stage of which microbatch, and when.
      backward: see `ModelDef`.
      skip: whether idle ranks skip their work; see `ModelDef`.

    Attributes:
      program: schedule and buffers.
      layers_CRk: the layer in each slot, int32 `[chunks, ranks, k]`; -1 in empty slots.
      manual_axes: mesh axes over which gradients are always computed manually.
      weights: a `Weight` per parameter, as they live on the devices.

    Raises:
      UserError: a module that does not follow `nn.Model`, whose forward pass changes state, or with fewer layers than
        stages; or a `backward` that the schedule does not have.
    """

    def __init__(self, module: SplitModule, schedule: Schedule, backward: BackwardName, *, skip: bool):
        self.module, self.skip = module, skip
        check_backward(schedule, backward)
        check_trains(schedule)
        layers = _layers(module)
        self.layers_CRk: np.ndarray = layer_table(schedule, layers)
        slots = [int(np.flatnonzero(self.layers_CRk.ravel() == layer)[0]) for layer in range(layers)]
        self._layout = Layout(layers, self.layers_CRk.shape, tuple(slots))
        self.weights: Tree = self._layout.live_weights(module.canonical_weights)
        self.program = allocate(schedule, save_residuals=backward == "save")

    def check_mesh(self, mesh: Mesh) -> None:
        """Refuse a mesh with another number of ranks than the schedule; raises what `check_ranks` raises."""
        check_ranks(self.program.schedule, mesh)

    def check_step(
        self, partitioner: Partitioner, loss: LossFunction | None = None, accumulate: int = 1, gather: Gather = "tick"
    ) -> None:
        """Refuse options of a step that a pipeline cannot have.

        Raises:
          UserError: a loss function, or microbatches outside of the pipeline; or weights that cannot be gathered once
            per step.
        """
        if loss is not None:
            raise UserError(
                "a loss function of its own cannot be pipelined: only nn.Model's head can; drop loss, or the schedule"
            )
        check_accumulate(accumulate)
        if gather == "step":
            split_dims(self.weights, partitioner)

    def canonical(self, tree: Any) -> Any:
        """A state tree with `[layers, ...]` leaves, as checkpoints store it."""
        return self._layout.unpack(tree, self.module.canonical_weights)

    def live(self, tree: Any) -> Any:
        """The inverse of `canonical`."""
        return self._layout.pack(tree, self.module.canonical_weights)

    def stored_on(self, partitioner: Partitioner) -> Partitioner:
        """The partitioner of checkpoints, which also splits layers over `pipe` if their number is a multiple of it."""
        if self._layout.n_layers % partitioner.mesh.shape["pipe"]:
            return partitioner
        rules = {**partitioner.rules, "layers": (*partitioner.rules["layers"], "pipe")}
        return dataclasses.replace(partitioner, rules=rules)

    def checked(self, jitted: Any, mesh: Mesh) -> Any:
        """A jitted step that is checked before it runs, if idle ranks skip their work."""
        return CheckedStep(jitted, mesh) if self.skip else jitted

    def warning(self) -> str | None:
        """A warning where ranks idle for more than a quarter of the time."""
        return bubble_warning(self.program.schedule)

    def summary(self) -> str | None:
        """Schedule, number of layers of each stage and bubble, on one line."""
        schedule = self.program.schedule
        counts = [(self.layers_CRk[chunk, rank] >= 0).sum() for rank, chunk in schedule.placement]
        idle = ", skipped" if self.skip else ""
        return (
            f"pipeline: {schedule.name}, {schedule.ranks} ranks x {schedule.chunks} chunks, {schedule.microbatches} "
            f"microbatches, bubble {simulate(schedule).bubble_fraction:.0%}{idle}; layers of the stages: "
            f"{' '.join(map(str, counts))}"
        )

    def gradients(
        self, options: Gradients, params: Tree, model_state: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Tree, Sums, Tree]:
        """Gradients of the summed loss over this region's rows, the sums behind it, and the module's state, unchanged.

        To be called within a region manual over `pipe`, where `params` holds this rank's layers, as do the gradients
        of the layers; the gradients of all other parameters are this rank's share of a sum.
        """
        partitioner = options.partitioner
        stage = self._stage(params, batch, self.module.context(batch, key, train=True), skip=self.skip)

        def weights() -> tuple[jax.Array, dict[str, jax.Array]]:
            # All layers are alike, so one stands for all of them.
            parts, shared, ctx = stage.model, stage.shared, stage.ctx
            x, aux = parts.block(jax.tree.map(lambda a: a[0, 0], stage.stacked), parts.embed(shared, batch, ctx), ctx)
            weight = parts.head(shared, x, batch, ctx)["loss"][1]
            return weight, {name: w * self._layout.n_layers for name, (_, w) in aux.items()}

        weights_stacked, weights_shared = split_layers(trained(self.weights, self.weights))
        of_rank = jax.tree.map(lambda w: dataclasses.replace(w, axes=(w.axes[0], *w.axes[2:])), weights_stacked)

        def constrain_gradients(stacked: Tree, shared: Tree) -> tuple[Tree, Tree]:
            return widened(stacked, of_rank, partitioner), widened(shared, weights_shared, partitioner)

        dstacked, dshared, sums = pipeline_gradients(
            self.program,
            self.layers_CRk,
            dataclasses.replace(stage, aux_scales=aux_scales(weights, options.total)),
            microbatches(batch, self.program.schedule.microbatches, "pipeline.microbatches"),
            constrain_gradients,
        )
        return join_layers(jax.tree.map(lambda g: g[:, None], dstacked), dshared), sums, model_state


def _layers(module: SplitModule) -> int:
    """The number of layers of a module that can be pipelined."""
    outline, changing = module.outline({}), [*module.random, *module.mutable]
    if changing or not isinstance(getattr(outline, "blocks", None), Stack):
        reason = f"the forward pass changes {', '.join(changing[:3])}" if changing else "it has no Stack named blocks"
        raise UserError(
            f"{type(outline).__name__} cannot be pipelined: {reason}; set mesh.pipe to 1, or write the model as "
            "shardtrain.nn.Model describes"
        )
    return outline.blocks.n_layers
