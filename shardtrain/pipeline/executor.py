"""The executor: runs any pipeline schedule inside one SPMD program, on stock JAX.

It is called within a `jax.shard_map` that is manual over `pipe`. By default every rank does the same work in every
tick; an idle rank computes values that are never read. So the program has no conditional, and any collective is legal
inside a stage; an idle rank would have waited anyway. Consecutive ticks with the same phases are one `lax.scan`, so the
program does not grow with the number of microbatches. Messages are exchanged only at the start of a tick.

A table whose phases change all the time would make as many loops as ticks. Then all its ticks are one loop, in which
each phase is a branch that all ranks take together.

With `skip` an idle rank takes another branch, and all ticks are one loop. Collectives inside branches must then stay
within a rank: see `idle.py`.

The computation of a stage is in `stage.py`, the phases and the values that they store for each other are in
`phases.py`, and the only phase of a pipeline without a backward pass is in `forward.py`.

Shapes: M microbatches, C chunks of a rank, R ranks, k layers of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.nn.model import Batch
from shardtrain.nn.returned import joined
from shardtrain.nn.stack import Aux
from shardtrain.pipeline.forward import OutputFunction, forward_only, stage_output
from shardtrain.pipeline.idle import UNIFORM
from shardtrain.pipeline.microbatches import microbatch
from shardtrain.pipeline.phases import Carry, Phase, TableRow, backward_mode
from shardtrain.pipeline.schedules import Program, Segment
from shardtrain.pipeline.slots import buffer, select, write, zeros_like
from shardtrain.pipeline.stage import MicrobatchAtStage, StageFunctions
from shardtrain.weights.precision import at_least_float32

AXIS = "pipe"
#: The most loops over ticks. The built-in schedules make two to four, whatever their size.
_MOST_SEGMENTS = 8
Tree = Any
Edges = tuple[tuple[int, int], ...]


def pipeline_gradients(
    program: Program,
    layers_CRk: np.ndarray,
    stage: StageFunctions,
    batch_M: Batch,
    constrain_gradients: Callable[[Tree, Tree], tuple[Tree, Tree]],
) -> tuple[Tree, Tree, dict[str, tuple[jax.Array, jax.Array]]]:
    """Compute gradients of the summed loss over all microbatches; to be called in a region manual over `pipe`.

    Args:
      program: schedule and buffers, which also determine the backward mode (see `phases.py`): `split` if the schedule
        has a phase W, `save` if the program was allocated with `save_residuals`, else `remat`.
      layers_CRk: from `layer_table`.
      stage: the model's parts, this rank's parameters, and whether idle ranks skip.
      batch_M: microbatches, `[B / M, M, ...]` each.
      constrain_gradients: sets sharding and dtype of the gradients of (`stage.stacked`, `stage.shared`).

    Returns:
      This rank's gradients of what trains of `stage.stacked` and of `stage.shared`, and `{name: (sum, weight)}` over
      all ranks.
    """
    microbatch_at = microbatch_lookup(program, layers_CRk, batch_M)
    example = microbatch_at(jnp.int32(0))
    x = jax.eval_shape(stage.embed, example)
    zeros = zeros_like(x)
    dstacked, dshared = stage.model.trained_layer(stage.stacked), stage.model.trained_shared(stage.shared)
    totals = {"sums": _zero_sums(stage, zeros, example), "dshared": jax.tree.map(_wide_zeros, dshared)}
    mode = backward_mode(program)(stage, example)

    def constrain(carry: Carry) -> Carry:
        dstacked, dshared = constrain_gradients(carry["dstacked"], carry["dshared"])
        x, g = (jax.vmap(stage.model.constrain)(carry[kind]) for kind in "xg")
        return carry | {"x": x, "g": g, "dstacked": dstacked, "dshared": dshared}

    like = {"x": x, "g": x, **mode.buffers}
    carry = {
        **{kind: buffer(tree, program.slots[kind]) for kind, tree in like.items()},
        "y": zeros,
        "dx": zeros,
        "dstacked": jax.tree.map(_wide_zeros, dstacked),
        **totals,
    }
    carry = run_ticks(program, stage, microbatch_at, mode.phases, constrain, carry)
    return carry["dstacked"], carry["dshared"], jax.lax.psum(carry["sums"], AXIS)


def pipeline_forward(
    program: Program, layers_CRk: np.ndarray, stage: StageFunctions, batch_M: Batch, output: OutputFunction
) -> tuple[Tree, Aux]:
    """Run forward passes alone; to be called in a region manual over `pipe`.

    Args:
      program: allocated for a schedule of `schedules.forward`.
      layers_CRk: from `layer_table`.
      stage: the model's parts, this rank's parameters, and whether idle ranks skip.
      batch_M: microbatches, `[B / M, M, ...]` each.
      output: `(shared, y, batch, ctx) -> pytree of arrays`, of the last block's output for one microbatch.

    Returns:
      Outputs and auxiliary terms, each summed over microbatches and ranks.
    """
    microbatch_at = microbatch_lookup(program, layers_CRk, batch_M)

    def constrain(carry: Carry) -> Carry:
        return carry | {"x": jax.vmap(stage.model.constrain)(carry["x"])}

    example = microbatch_at(jnp.int32(0))
    x = jax.eval_shape(stage.embed, example)
    _, sums = jax.eval_shape(partial(stage_output, stage, output), x, example)
    carry = {"x": buffer(x, program.slots["x"]), "y": zeros_like(x), "sums": zeros_like(sums)}
    carry = run_ticks(program, stage, microbatch_at, {"F": forward_only(stage, output)}, constrain, carry)
    return jax.lax.psum(carry["sums"], AXIS)


def run_ticks(
    program: Program,
    stage: StageFunctions,
    microbatch_at: Callable[[jax.Array], MicrobatchAtStage],
    phases: Mapping[str, Phase],
    constrain: Callable[[Carry], Carry],
    carry: Carry,
) -> Carry:
    """Run all ticks, one after the other."""
    rank = jax.lax.axis_index(AXIS)
    segments = program.segments()
    irregular = len(segments) > _MOST_SEGMENTS and not stage.skip

    def phase(run: Phase, carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        return constrain(run(carry, row, mb))

    def tick(segment: Segment) -> Callable[[Carry, TableRow], tuple[Carry, None]]:
        def run(carry: Carry, columns: TableRow) -> tuple[Carry, None]:
            row = {name: column[rank] for name, column in columns.items()}
            carry = _receive(carry, row, {name: program.edges[name] for name in segment.messages}, rank)
            for name in segment.phases:
                mb = microbatch_at(row[name])
                mb = dataclasses.replace(
                    mb,
                    first=mb.first if name in segment.first else np.False_,
                    last=mb.last if name in segment.last else np.False_,
                )
                go = partial(phase, phases[name], carry, row, mb)
                if irregular:  # all of the carry goes through the branch, so that nothing overtakes it
                    with jax.named_scope(UNIFORM):  # all ranks take the same branch, so it may hold collectives
                        carry = jax.lax.cond((columns[name] >= 0).any(), go, lambda carry=carry: carry)
                else:
                    carry = stage.skip_unless(mb.active, go, carry)
            return constrain(carry), None

        return run

    carry = constrain(carry)
    # Where phases are branches, no tick costs more for having all of them.
    for segment in [program.segment(0, program.schedule.ticks)] if stage.skip or irregular else segments:
        columns: dict[str, Any] = {
            name: column[segment.start : segment.stop] for name, column in program.columns.items()
        }
        carry, _ = jax.lax.scan(tick(segment), carry, columns)
    return carry


def microbatch_lookup(
    program: Program, layers_CRk: np.ndarray, batch_M: Batch
) -> Callable[[jax.Array], MicrobatchAtStage]:
    """Return a function from a table entry to the microbatch at this rank's stage; for -1 it is not active."""
    schedule, rank = program.schedule, jax.lax.axis_index(AXIS)

    def microbatch_at(entry: jax.Array) -> MicrobatchAtStage:
        active = entry >= 0
        chunk, m = jnp.divmod(jnp.maximum(entry, 0), schedule.microbatches)
        stage = jnp.asarray(schedule.stage_RC)[rank, chunk]
        return MicrobatchAtStage(
            active=active,
            first=active & (stage == 0),
            last=active & (stage == schedule.stages - 1),
            chunk=chunk,
            layers_k=jnp.asarray(layers_CRk)[chunk, rank],
            batch=microbatch(batch_M, m),
        )

    return microbatch_at


def _receive(carry: Carry, row: TableRow, messages: Mapping[str, Edges], rank: jax.Array) -> Carry:
    """Write the messages of the last tick into their slots.

    A rank sends its one output (or gradient) along all edges of this tick; a rank for which it is not meant writes it
    to the slot that is never read.
    """
    received: dict[str, Any] = {}
    for name, edges in messages.items():
        kind, sent = name[0], carry["y" if name[0] == "x" else "dx"]
        received[kind] = write(received.get(kind, carry[kind]), row[name], _permute(sent, edges, rank))
    return carry | received


def _permute(sent: Tree, edges: Edges, rank: jax.Array) -> Tree:
    """Send along the edges; without edges a rank receives its own value.

    Ring placements close a ring. It is sent as two permutes, each an open chain, because XLA has miscompiled permutes
    with cycles on GPUs (openxla/xla#45222).
    """
    down, up = (tuple(e for e in edges if (e[0] < e[1]) == way) for way in (True, False))
    permuted = [jax.tree.map(lambda a, e=e: jax.lax.ppermute(a, AXIS, e), sent) for e in (down, up) if e]
    if len(permuted) < 2:
        return permuted[0] if permuted else sent
    return select((rank == np.array([to for _, to in down])).any(), *permuted)


def _zero_sums(stage: StageFunctions, x: Tree, mb: MicrobatchAtStage) -> dict[str, tuple[jax.Array, jax.Array]]:
    def sums() -> dict[str, Any]:
        y, aux = stage.forward(stage.params(mb), x, mb)
        return joined(stage.head(stage.shared, y, mb), aux)

    return zeros_like(jax.eval_shape(sums))


def _wide_zeros(weight: jax.Array) -> jax.Array:
    return jnp.zeros(weight.shape, at_least_float32(weight.dtype))
