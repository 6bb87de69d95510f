"""Which layers lie where in a pipeline, and how what goes from stage to stage is laid out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from shardtrain.errors import UserError
from shardtrain.nn.model import Batch
from shardtrain.pipeline.schedules import Schedule
from shardtrain.sharding import Partitioner


def layers_per_stage(n_layers: int, stages: int) -> list[int]:
    """How many layers each stage holds: as equal as can be, with fewer at the ends, which do more.

    Raises:
      UserError: fewer layers than stages.
    """
    if n_layers < stages:
        rule = f"{stages} pipeline stages (mesh.pipe x pipeline.chunks) need a layer each"
        raise UserError("model.n_layers", n_layers, rule, f"use {stages} layers or more, or fewer ranks or chunks")
    counts = [n_layers // stages] * stages
    middle_first = sorted(range(stages), key=lambda stage: abs(stage - (stages - 1) / 2))
    for stage in middle_first[: n_layers % stages]:
        counts[stage] += 1
    return counts


def check_ranks(schedule: Schedule, mesh: Mesh) -> None:
    """Refuse a schedule on a mesh with another number of pipeline ranks.

    Raises:
      UserError: names both.
    """
    if schedule.ranks != (pipe := mesh.shape["pipe"]):
        raise UserError(
            f"the model's schedule {schedule.name} is for {schedule.ranks} ranks, but the mesh axis pipe is {pipe}; "
            f"make the schedule for {pipe} ranks, or the mesh with pipe {schedule.ranks}"
        )


def check_accumulate(accumulate: int) -> None:
    """Refuse to accumulate gradients over microbatches in addition to those of a pipeline."""
    if accumulate > 1:
        fix = "set optimizer.accumulate=1 and choose pipeline.microbatches"
        raise UserError("optimizer.accumulate", accumulate, "a pipeline has microbatches of its own", fix)


def layer_table(schedule: Schedule, n_layers: int) -> np.ndarray:
    """The layer in each slot, int32 `[chunks, ranks, k]`; -1 in slots of no layer."""
    counts = layers_per_stage(n_layers, schedule.stages)
    table = np.full((schedule.chunks, schedule.ranks, max(counts)), -1, np.int32)
    first = 0
    for (rank, chunk), count in zip(schedule.placement, counts, strict=True):
        table[chunk, rank, :count] = np.arange(first, first + count)
        first += count
    return table


def pin(partitioner: Partitioner, batch: Batch) -> Callable[[Any], Any]:
    """A function that pins the layout of what goes from stage to stage, a pytree of `[B, ...]`.

    Rows are split as rows are, and the second dim as a sequence between blocks, if it is as long as the batch's.
    """
    length = batch["tokens"].shape[1] if "tokens" in batch else None

    def one(a: jax.Array) -> jax.Array:
        seq = "seq_residual" if a.ndim > 2 and a.shape[1] == length else None
        return partitioner.constrain(a, "batch", *(seq if dim == 1 else None for dim in range(1, a.ndim)))

    return lambda x: jax.tree.map(one, x)
