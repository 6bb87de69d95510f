"""Into and out of the region where gradients are made: weights gathered and gradients summed, by hand.

A pipeline that leaves fsdp to the compiler gathers the weights of a stage in every tick, and scatters their gradients
in every backward tick. By hand, each crosses fsdp once per step, for the memory of `WholeBytes`.
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
from shardtrain.sharding import Partitioner
from shardtrain.weights.weight import Weight

#: When a pipeline gathers the weights that fsdp splits: in each tick (by the compiler), or once per step (by hand).
Gather = Literal["tick", "step"]
Tree = Any

_AXIS = "fsdp"
#: In place of the dim that fsdp splits, for a weight that it does not.
NONE = -1


def check_gather(gather: Gather, fsdp: int) -> None:
    """Refuse to gather the weights that fsdp splits, once per step, where it splits none."""
    if gather == "step" and fsdp == 1:
        rule = "it gathers the weights that mesh.fsdp splits, and mesh.fsdp is 1"
        raise UserError("pipeline.gather", gather, rule, "drop pipeline.gather, or set mesh.fsdp=2 or more")


def split_dims(weights: Tree, partitioner: Partitioner) -> Tree:
    """The dim of each weight that fsdp splits, or `NONE`.

    Raises:
      UserError: weights or rows cannot be split over fsdp by hand, or none are; names what is in the way.
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


def _split_dim(path: tuple[Any, ...], weight: Weight, partitioner: Partitioner) -> int:
    for dim, part in enumerate(partitioner.spec(*weight.axes)):
        if part == _AXIS:
            return dim
        if isinstance(part, tuple) and _AXIS in part:
            name, logical = jax.tree_util.keystr(path, simple=True, separator="."), weight.axes[dim]
            raise UserError(
                f"pipeline.gather step needs fsdp to be the only mesh axis on a dim, and weight {name} has "
                f"{' x '.join(part)} on dim {dim} ({logical!r}): gathered over fsdp alone, its parts would not lie in "
                f"order; set rules.{logical} to one of them, or use gather tick"
            )
    return NONE


def entry_spec(weight: Weight, dim: int) -> PartitionSpec:
    """How a weight enters the region: its rank's layers, and this rank's part of what fsdp splits by hand."""
    return PartitionSpec(
        *("pipe" if axis == "stages" else _AXIS if i == dim else None for i, axis in enumerate(weight.axes))
    )


def gathered(params: Tree, weights: Tree, dims: Tree, partitioner: Partitioner) -> Tree:
    """Whole weights of this rank's shards, in the parameters' dtypes; within a region manual over fsdp.

    A weight that its layer casts to a narrower dtype anyway travels in that one: the layer sees the same values.
    """

    def one(shard: jax.Array, weight: Weight, dim: int) -> jax.Array:
        if dim == NONE:
            return shard
        narrow = shard if weight.compute is None else shard.astype(_narrower(shard.dtype, weight.compute))
        return jax.lax.all_gather(narrow, _AXIS, axis=dim, tiled=True).astype(shard.dtype)

    return on_parts(lambda params: jax.tree.map(one, params, weights, dims), weights, partitioner)(params)


def summed(grad: jax.Array, axes: Sequence[str], dtype: Any, dim: int = NONE) -> jax.Array:
    """The sum of a gradient over mesh axes, of which fsdp leaves each rank its part of `dim`, if there is one.

    It comes first, so that the other axes add up as little as there is. A float32 gradient travels in `dtype`; a wider
    one, of wider parameters, as it is. See `on_parts`.
    """
    if not axes:
        return grad
    total = grad.astype(dtype) if grad.dtype == jnp.float32 else grad
    if dim != NONE:
        total = jax.lax.psum_scatter(total, _AXIS, scatter_dimension=dim, tiled=True)
        axes = [axis for axis in axes if axis != _AXIS]
    return (jax.lax.psum(total, tuple(axes)) if axes else total).astype(grad.dtype)


def on_parts(function: Callable[[Tree], Tree], weights: Tree, partitioner: Partitioner) -> Callable[[Tree], Tree]:
    """A function of a tree like `weights`, in and out, with all mesh axes manual; to be called in a manual region.

    With axes left to it, XLA makes what an all-gather or reduce-scatter by hand takes whole over these first; and on a
    CPU it aborts where the sum is of bfloat16.
    """
    specs = jax.tree.map(lambda w: partitioner.spec(*w.axes), weights)  # over the axes that are not manual yet
    axes = {*partitioner.mesh.axis_names} - {*jax.sharding.get_abstract_mesh().manual_axes}
    return jax.shard_map(function, in_specs=(specs,), out_specs=specs, axis_names=axes, check_vma=False)


@dataclasses.dataclass(frozen=True)
class WholeBytes:
    """What a device holds during a step because fsdp is by hand, in bytes.

    Attributes:
      weights: gathered ones, all of this device's stages and what they share.
      gradients: accumulated ones of the same, and of the weights that fsdp never splits; float32 or wider.
    """

    weights: int
    gradients: int


def whole_bytes(weights: Tree, partitioner: Partitioner) -> WholeBytes:
    """From shapes alone; raises what `split_dims` does."""
    held = {"weights": 0, "gradients": 0}
    dims = jax.tree.leaves(split_dims(weights, partitioner))
    for weight, dim in zip(jax.tree.leaves(weights), dims, strict=True):
        pieces = math.prod(partitioner.size(axis) for i, axis in enumerate(weight.axes) if axis and i != dim)
        held["gradients"] += weight.size // pieces * jnp.promote_types(weight.dtype, jnp.float32).itemsize
        held["weights"] += 0 if dim == NONE else weight.nbytes // pieces
    return WholeBytes(**held)


def _narrower(stored: Any, compute: Any) -> Any:
    return compute if jnp.finfo(compute).bits < jnp.finfo(stored).bits else stored
