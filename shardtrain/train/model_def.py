"""The definition of a model: a Flax module, and how its layers run, with or without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
from flax import nnx

from shardtrain.errors import UserError, did_you_mean, require_kind
from shardtrain.pipeline.idle import Idle
from shardtrain.pipeline.phases import BackwardName
from shardtrain.pipeline.schedules import Schedule
from shardtrain.train.pipelined import PipelinedModel
from shardtrain.train.split_module import SplitModule, Tree
from shardtrain.train.unpipelined import UnpipelinedModel
from shardtrain.weights.trained import ALL


class ModelDef(SplitModule):
    """A Flax NNX module and what is known of its variables before any array exists.

    Args:
      make: builds the module from `nnx.Rngs`. Called abstractly here, and again inside jit by `init`.
      schedule: of a pipeline over the mesh axis `pipe`; the weights of `blocks` then live as `[chunks, pipe, k, ...]`.
      backward: for a schedule without W, whether the backward pass of a stage recomputes its forward pass (`remat`) or
        uses saved residuals (`save`), as far as the remat policy of the layers allows.
      idle: for a schedule, whether idle ranks compute on values that nobody reads, or `skip` their work, as well as
        embedding and head on all ranks but those at the ends. See `shardtrain.pipeline.idle` for when that is refused.
      replicate_unannotated: accept weights without logical axes, and replicate them. By default a module opts in with
        an attribute of that name.
      trains: patterns of the weights that may train, by path (`blocks.layer.attention`, `*.norm`) or role
        (`role:embedding`); see `weights.trained.marked`.
      freeze: patterns of the weights that do not. They have no gradient, no optimizer state and no decay.

    Attributes:
      execution: how the model computes gradients, evaluation sums and outputs: an `UnpipelinedModel` or a
        `PipelinedModel`.
      weights: a `Weight` per parameter, as they live on the devices.
      canonical_weights: the same as checkpoints store them, with the layers as `[layers, ...]`.

    Raises:
      UserError: a `make` that builds no module from `nnx.Rngs`, or one that keeps bare arrays; weights without logical
        axes in a module that did not opt in, or with the axes of a mesh; names them. Under a schedule, a module that
        does not follow `nn.Model`, whose forward pass changes state, or with fewer layers than stages; or a `backward`
        that the schedule does not have. A pattern that matches no weight, or none that trains.
    """

    execution: UnpipelinedModel | PipelinedModel

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        *,
        schedule: Schedule | None = None,
        backward: BackwardName = "remat",
        idle: Idle = "compute",
        replicate_unannotated: bool | None = None,
        trains: Sequence[str] = ALL,
        freeze: Sequence[str] = (),
    ):
        super().__init__(make, replicate_unannotated=replicate_unannotated, trains=trains, freeze=freeze)
        if idle not in get_args(Idle):
            fix = did_you_mean(idle, get_args(Idle))
            raise UserError("pipeline.idle", idle, "there is no such thing for idle ranks to do", fix)
        if schedule is None:
            self.execution = UnpipelinedModel(self)
        else:
            require_kind("schedule", schedule, Schedule, "make one with schedules.make('1f1b', ranks, microbatches)")
            self.execution = PipelinedModel(self, schedule, backward, skip=idle == "skip")
        self.weights = self.execution.weights

    @property
    def is_canonical(self) -> bool:
        """Whether the weights live on the devices as checkpoints store them."""
        return self.weights is self.canonical_weights

    def canonical(self, tree: Any) -> Any:
        """A state tree with `[layers, ...]` leaves, as checkpoints store it."""
        return self.execution.canonical(tree)

    def live(self, tree: Any) -> Any:
        """The inverse of `canonical`."""
        return self.execution.live(tree)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Live parameters and other state, drawn from `key`; a pure function, to be jitted with output shardings."""
        params, model_state = self.draw(key)
        return self.live(params), model_state
