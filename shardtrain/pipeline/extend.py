"""New tokens of a text through all stages; each rank keeps what its own layers need for the tokens that follow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.nn.cache import constrain_kept
from shardtrain.nn.model import Batch
from shardtrain.pipeline.executor import AXIS, microbatch_lookup, run_ticks
from shardtrain.pipeline.forward import OutputFunction, output_of_last_stage
from shardtrain.pipeline.phases import Carry, TableRow, stage_input
from shardtrain.pipeline.schedules import Program
from shardtrain.pipeline.slots import buffer, read_at, write, zeros_like
from shardtrain.pipeline.stage import MicrobatchAtStage, StageFunctions

Tree = Any


def pipeline_extend(
    program: Program, layers_CRk: np.ndarray, stage: StageFunctions, batch: Batch, past: Tree, output: OutputFunction
) -> tuple[Tree, Tree]:
    """Run one forward pass with a cache; to be called in a region manual over `pipe`.

    Args:
      program: allocated for a schedule of `schedules.forward` with one microbatch.
      layers_CRk: from `layer_table`.
      stage: the model's parts and this rank's parameters.
      batch: the new tokens, `[B, ...]` each.
      past: what this rank's layers kept, `[C, k, B, slots, ...]`; `None` at the start of a text.
      output: of the last block's output, as for `pipeline_forward`.

    Returns:
      The output, on all ranks, and what this rank's layers keep of the new tokens, `[C, k, B, tokens, ...]`.
    """
    microbatch_at = microbatch_lookup(program, layers_CRk, jax.tree.map(lambda a: a[:, None], batch))

    def extended(x: Tree, mb: MicrobatchAtStage) -> tuple[Tree, Tree, Tree]:
        of_chunk = jax.tree.map(lambda a: read_at(a, mb.chunk), past)
        y, kept = stage.extend(stage.params(mb), x, of_chunk, mb)
        return y, output_of_last_stage(stage, output, y, mb), kept

    def forward(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        y, found, kept = extended(stage_input(stage, carry, row, mb), mb)
        # A rank that is idle in this tick writes to the slot that is never read.
        kept = write(carry["kept"], jnp.where(mb.active, mb.chunk, -1), kept)
        return carry | {"y": y, "sums": jax.tree.map(jnp.add, carry["sums"], found), "kept": kept}

    def constrain(carry: Carry) -> Carry:
        x, kept = jax.vmap(stage.model.constrain)(carry["x"]), constrain_kept(carry["kept"], (None, None), "seq")
        return carry | {"x": x, "kept": kept}

    example = microbatch_at(jnp.int32(0))
    x = jax.eval_shape(stage.embed, example)
    _, found, kept = jax.eval_shape(extended, x, example)
    kept, found = buffer(kept, program.schedule.chunks), zeros_like(found)
    carry = {"x": buffer(x, program.slots["x"]), "y": zeros_like(x), "sums": found, "kept": kept}
    carry = run_ticks(program, stage, microbatch_at, {"F": forward}, constrain, carry)
    return jax.lax.psum(carry["sums"], AXIS), jax.tree.map(lambda a: a[:-1], carry["kept"])
