"""FSDP as explicit collectives, once per step: weights are gathered and gradients are reduced.

A pipeline that leaves FSDP to the compiler gathers the weights of a stage in every tick, and scatters their gradients
in every backward tick. With explicit collectives each crosses `fsdp` once per step, for the memory of `GatheredBytes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.errors import UserError
from shardtrain.sharding import Partitioner, mesh_axes
from shardtrain.weights.paths import Path, dotted
from shardtrain.weights.weight import Weight

#: When a pipeline gathers the weights that `fsdp` splits: in each tick (the compiler does), or once per step.
Gather = Literal["tick", "step"]
Tree = Any

_AXIS = "fsdp"
#: The split dim of a weight that `fsdp` does not split.
NONE = -1


def check_gather(gather: Gather, fsdp: int) -> None:
    """Refuse to gather the weights that fsdp splits, once per step, where it splits none."""
    if gather == "step" and fsdp == 1:
        rule = "it gathers the weights that mesh.fsdp splits, and mesh.fsdp is 1"
        raise UserError("pipeline.gather", gather, rule, "drop pipeline.gather, or set mesh.fsdp=2 or more")


def split_dims(weights: Tree, partitioner: Partitioner) -> Tree:
    """Return the dim of each weight that `fsdp` splits, or `NONE`.

    Args:
      weights: tree of `Weight`.
      partitioner: mesh and rules.

    Raises:
      UserError: weights or rows cannot be split over `fsdp` manually, or no weight is; names the obstacle.
    """
    check_gather("step", partitioner.mesh.shape[_AXIS])
    if _AXIS not in partitioner.rules["batch"]:
        raise UserError(
            f"pipeline.gather step gives each fsdp rank rows of its own, but rules.batch {partitioner.rules['batch']} "
            "does not split them over fsdp; add fsdp to it, or use gather tick"
        )
    dims = jax.tree_util.tree_map_with_path(lambda path, w: _split_dim(path, w, partitioner), weights)
    if set(jax.tree.leaves(dims)) <= {NONE}:
        raise UserError(
            "pipeline.gather step has nothing to gather: by the rules no weight is split over fsdp; use gather tick"
        )
    return dims


def _split_dim(path: Path, weight: Weight, partitioner: Partitioner) -> int:
    for dim, part in enumerate(partitioner.spec(*weight.axes)):
        axes, logical = mesh_axes(part), weight.axes[dim]
        if axes == (_AXIS,):
            return dim
        if _AXIS in axes:
            raise UserError(
                f"pipeline.gather step needs fsdp to be the only mesh axis on a dim, and weight {dotted(path)} has "
                f"{' x '.join(axes)} on dim {dim} ({logical!r}): gathered over fsdp alone, its shards would be out of "
                f"order; set rules.{logical} to one of them, or use gather tick"
            )
    return NONE


def entry_spec(weight: Weight, dim: int) -> PartitionSpec:
    """Return the partition with which a weight enters the manual region: this rank's layers, and its `fsdp` shard.

    Args:
      weight: the weight.
      dim: the dim that `fsdp` splits manually, or `NONE`.
    """
    return PartitionSpec(
        *("pipe" if axis == "stages" else _AXIS if i == dim else None for i, axis in enumerate(weight.axes))
    )


def gathered(params: Tree, weights: Tree, dims: Tree, partitioner: Partitioner) -> Tree:
    """Gather this rank's weights over `fsdp`, in the parameters' dtypes; to be called in a region manual over `fsdp`.

    A weight that its layer casts to a narrower dtype anyway is sent in that dtype: the layer sees the same values.

    Args:
      params: the shards.
      weights: tree of `Weight`, congruent with `params`.
      dims: from `split_dims`.
      partitioner: mesh and rules.
    """

    def gather(shard: jax.Array, weight: Weight, dim: int) -> jax.Array:
        if dim == NONE:
            return shard
        narrow = shard if weight.compute is None else shard.astype(_narrower(shard.dtype, weight.compute))
        return jax.lax.all_gather(narrow, _AXIS, axis=dim, tiled=True).astype(shard.dtype)

    return on_shards(lambda params: jax.tree.map(gather, params, weights, dims), weights, partitioner)(params)


def summed(grad: jax.Array, axes: Sequence[str], dtype: Any, dim: int = NONE) -> jax.Array:
    """Sum a gradient over mesh axes; to be called within `on_shards`.

    Over `fsdp` it is a reduce-scatter, which leaves each rank its shard. It comes first, so that the other axes sum
    as little as possible.

    Args:
      grad: this device's share of the gradient.
      axes: the mesh axes.
      dtype: in which a float32 gradient is sent. A wider one, of wider parameters, keeps its dtype.
      dim: the dim that `fsdp` splits, or `NONE`.
    """
    if not axes:
        return grad
    total = grad.astype(dtype) if grad.dtype == jnp.float32 else grad
    if dim != NONE:
        total = jax.lax.psum_scatter(total, _AXIS, scatter_dimension=dim, tiled=True)
        axes = [axis for axis in axes if axis != _AXIS]
    return (jax.lax.psum(total, tuple(axes)) if axes else total).astype(grad.dtype)


def on_shards(function: Callable[[Tree], Tree], weights: Tree, partitioner: Partitioner) -> Callable[[Tree], Tree]:
    """Wrap a function of a tree like `weights` so that all mesh axes are manual; to be called in a manual region.

    If axes were left to XLA, it would first gather the operand of an explicit all-gather or reduce-scatter over these;
    and on CPUs it aborts where the sum is of bfloat16.

    Args:
      function: maps a tree like `weights` to another.
      weights: tree of `Weight`.
      partitioner: mesh and rules.
    """
    specs = jax.tree.map(lambda w: partitioner.spec(*w.axes), weights)  # over the axes that are not manual yet
    axes = {*partitioner.mesh.axis_names} - {*jax.sharding.get_abstract_mesh().manual_axes}
    return jax.shard_map(function, in_specs=(specs,), out_specs=specs, axis_names=axes, check_vma=False)


@dataclasses.dataclass(frozen=True)
class GatheredBytes:
    """The bytes that a device holds during a step because weights are gathered once per step.

    Attributes:
      weights: gathered weights, of all stages of this device and those that the stages share.
      gradients: accumulated gradients of the same, and of the weights that `fsdp` does not split; float32 or wider.
    """

    weights: int
    gradients: int


def gathered_bytes(weights: Tree, partitioner: Partitioner) -> GatheredBytes:
    """Count from shapes alone.

    Args:
      weights: tree of `Weight`.
      partitioner: mesh and rules.

    Raises:
      UserError: as `split_dims`.
    """
    held = {"weights": 0, "gradients": 0}
    dims = jax.tree.leaves(split_dims(weights, partitioner))
    for weight, dim in zip(jax.tree.leaves(weights), dims, strict=True):
        shards = math.prod(partitioner.shards(axis) for i, axis in enumerate(weight.axes) if axis and i != dim)
        wide = jnp.promote_types(weight.dtype, jnp.float32).itemsize
        held["gradients"] += weight.size // shards * wide if weight.trains else 0
        held["weights"] += 0 if dim == NONE else weight.nbytes // shards
    return GatheredBytes(**held)


def _narrower(stored: Any, compute: Any) -> Any:
    return compute if jnp.finfo(compute).bits < jnp.finfo(stored).bits else stored
