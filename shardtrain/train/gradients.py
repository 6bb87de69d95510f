"""Gradients of the global batch: which devices compute them from which rows, and where they are added up."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.collectives.fsdp import NONE, Gather, entry_spec, gathered, on_shards, split_dims, summed
from shardtrain.nn.model import Batch
from shardtrain.nn.returned import Sums
from shardtrain.sharding import Partitioner
from shardtrain.train.loss_sums import LossFunction, nonzero, row_axes
from shardtrain.train.model_def import ModelDef
from shardtrain.train.split_module import Tree
from shardtrain.train.state import TrainState
from shardtrain.weights.trained import trained
from shardtrain.weights.weight import Weight


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Computes gradients of the mean loss over the global batch.

    The loss is `loss_sum / weight_sum` plus each auxiliary `sum / weight`, every quotient over the *global* batch.
    Microbatches run in a region that is manual over `data` and `island` (and `pipe`, for a pipeline): there each device
    group sums its own rows' gradients, and one reduction at the end, in `reduce_dtype`, adds them up. A pipeline that
    gathers weights once per step makes it manual over `fsdp` too. A batch in one piece is left to XLA, which reduces
    each gradient where it is computed, along with the rest of the backward pass, in the dtype of the gradient
    (`Precision.reduce`). So is a module with its own `loss`: operations over the batch (BatchNorm) see all of it.

    Attributes:
      model: whose parameters to differentiate.
      partitioner: the mesh and its rules.
      loss: of a module that does not follow `nn.Model`.
      accumulate: microbatches per step, without a pipeline.
      reduce_dtype: in which accumulated float32 gradients cross the `data` and `island` axes.
      gather: whether a pipeline gathers the weights that fsdp splits in each tick, or once per step.
    """

    model: ModelDef
    partitioner: Partitioner
    loss: LossFunction | None = None
    accumulate: int = 1
    reduce_dtype: Any = jnp.float32
    gather: Gather = "tick"

    def __call__(self, state: TrainState, batch: Batch, key: jax.Array) -> tuple[Tree, Sums, Tree]:
        """Compute the gradients; to be called inside jit, under `shardtrain.sharding.use(partitioner)`.

        Args:
          state: whose parameters and model state to use.
          batch: the global batch.
          key: for dropout.

        Returns:
          Gradients of the weights that train, the sums behind the loss, and the model's new state.
        """
        weights, run = self.model.weights, functools.partial(self._of_region, key)
        if manual := {*self._reduced, *self._pipe}:
            params_spec = jax.tree.map(entry_spec, weights, self._split_dims)
            run = jax.shard_map(
                run,
                mesh=self.partitioner.mesh,
                in_specs=(params_spec, PartitionSpec(), PartitionSpec(self._reduced or None)),
                out_specs=(trained(params_spec, weights), PartitionSpec(), PartitionSpec()),
                axis_names=manual,
                check_vma=False,  # other axes stay Auto, for which the check does not hold
            )
        grads, sums, model_state = run(state.params, state.model_state, batch)
        if not self._is_one_piece:
            weight = nonzero(sums["loss"][1])
            grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        return jax.tree.map(lambda g, w: g.astype(w.dtype), grads, trained(weights, weights)), sums, model_state

    def total(self, tree: Any) -> Any:
        """A tree added up over the devices of the region that have rows of their own."""
        return jax.lax.psum(tree, self._reduced) if self._reduced else tree

    @property
    def _pipe(self) -> tuple[str, ...]:
        return self.model.execution.manual_axes

    @property
    def _is_one_piece(self) -> bool:
        """Whether the batch is not cut into microbatches."""
        return self.accumulate == 1 and not self._pipe

    @functools.cached_property
    def _reduced(self) -> tuple[str, ...]:
        """The mesh axes over which the region adds up gradients manually."""
        axes = () if self.loss is not None or self._is_one_piece else row_axes(self.partitioner)
        return (*axes, "fsdp") if self.gather == "step" else axes

    @functools.cached_property
    def _split_dims(self) -> Tree:
        """The dim of each weight that fsdp splits manually, or `NONE`."""
        if self.gather == "step":
            return split_dims(self.model.weights, self.partitioner)
        return jax.tree.map(lambda _: NONE, self.model.weights)

    def _of_region(self, key: jax.Array, params: Tree, model_state: Tree, batch: Batch) -> tuple[Tree, Sums, Tree]:
        """Gradients from the rows of this device group, and then the reduction over all of them."""
        weights = self.model.weights
        if self.gather == "step":
            params = gathered(params, weights, self._split_dims, self.partitioner)
        grads, sums, model_state = self.model.execution.gradients(self, params, model_state, batch, key)
        if self._reduced or self._pipe:
            grads = on_shards(self._added_up, trained(weights, weights), self.partitioner)(grads)
            sums = self.total(sums)
        return grads, sums, model_state

    def _added_up(self, grads: Tree) -> Tree:
        def one(grad: jax.Array, weight: Weight, dim: int) -> jax.Array:
            grad = summed(grad, self._reduced, self.reduce_dtype, dim)
            return grad if "stages" in weight.axes else summed(grad, self._pipe, jnp.float32)

        weights = self.model.weights
        return jax.tree.map(one, grads, trained(weights, weights), trained(self._split_dims, weights))
