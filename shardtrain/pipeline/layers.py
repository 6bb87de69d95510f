"""Which rank of a pipeline holds which layers."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules import Schedule


def layers_per_stage(n_layers: int, stages: int, key: str = "model.n_layers") -> list[int]:
    """Return the number of layers of each stage, as equal as possible, with fewer at the ends, which do more work.

    Args:
      n_layers: layers of the model.
      stages: stages of the pipeline.
      key: the setting of `n_layers`, for messages.

    Raises:
      UserError: fewer layers than stages.
    """
    if n_layers < stages:
        rule = f"{stages} pipeline stages (mesh.pipe x pipeline.chunks) need a layer each"
        raise UserError(key, n_layers, rule, f"use {stages} layers or more, or fewer ranks or chunks")
    counts = [n_layers // stages] * stages
    middle_first = sorted(range(stages), key=lambda stage: abs(stage - (stages - 1) / 2))
    for stage in middle_first[: n_layers % stages]:
        counts[stage] += 1
    return counts


def check_ranks(schedule: Schedule, mesh: Mesh) -> None:
    """Refuse a schedule on a mesh with another number of pipeline ranks.

    Args:
      schedule: the schedule.
      mesh: the mesh, with its axis `pipe`.

    Raises:
      UserError: the numbers differ; names both.
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
    """Return the layer in each slot, int32 `[chunks, ranks, k]`, with -1 in padded slots.

    Args:
      schedule: the schedule, whose placement assigns stages to ranks and chunks.
      n_layers: layers of the model.

    Raises:
      UserError: fewer layers than stages.
    """
    counts = layers_per_stage(n_layers, schedule.stages)
    table = np.full((schedule.chunks, schedule.ranks, max(counts)), -1, np.int32)
    first = 0
    for (rank, chunk), count in zip(schedule.placement, counts, strict=True):
        table[chunk, rank, :count] = np.arange(first, first + count)
        first += count
    return table
