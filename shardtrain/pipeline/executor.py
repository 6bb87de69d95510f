"""The executor: runs any pipeline schedule inside one SPMD program, on stock JAX.

It is called within a `jax.shard_map` that is manual over `pipe`. By default every rank does the same work in every
tick, an idle one on values that nobody reads, so the program has no conditional and any collective is legal inside of a
stage; an idle rank would have waited anyway. Consecutive ticks with the same phases are one `lax.scan`, so the program
does not grow with the number of microbatches. Messages move only at the start of a tick.

A table in which the phases change all the time would make as many loops as ticks. All its ticks are one loop, in which
each phase is a branch that all ranks take alike.

With `skip` an idle rank takes another branch, and all ticks are one loop. Collectives inside of branches then have to
stay within a rank: see `idle.py`.

What a stage computes is in `stage.py`, what its phases keep for each other in `phases.py`, and the only phase of a
pipeline without a backward pass in `forward.py`.

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
from shardtrain.pipeline.forward import Result, finished, forward_only
from shardtrain.pipeline.idle import AGREED
from shardtrain.pipeline.phases import Phase, Row, State, backward_mode
from shardtrain.pipeline.schedules import Program, Segment
from shardtrain.pipeline.slots import buffer, microbatch, select, write, zeros_like
from shardtrain.pipeline.stage import Visit, Work

_AXIS = "pipe"
#: Of loops over ticks. The built-in schedules make two to four, whatever their size.
_MOST_SEGMENTS = 8
Tree = Any
Edges = tuple[tuple[int, int], ...]


def pipeline_gradients(
    program: Program,
    layers_CRk: np.ndarray,
    work: Work,
    batch_M: Batch,
    keep: Callable[[Tree, Tree], tuple[Tree, Tree]],
) -> tuple[Tree, Tree, dict[str, tuple[jax.Array, jax.Array]]]:
    """Gradients of the summed loss over all microbatches, and the sums behind it; within a region manual over `pipe`.

    Args:
      program: schedule and buffers, and thereby the backward mode (see `phases.py`): `split` if it has a phase W,
        `save` if it was allocated with `save_residuals`, else `remat`.
      layers_CRk: from `layer_table`.
      work: the model's parts, this rank's parameters, and whether idle ranks skip.
      batch_M: microbatches, `[B / M, M, ...]` each.
      keep: pins the layout and dtype of gradients of (`work.stacked`, `work.shared`).

    Returns:
      This rank's gradients of `work.stacked` and of `work.shared`, and `{name: (sum, weight)}` (all ranks').
    """
    visit = _visits(program, layers_CRk, batch_M)
    some = visit(jnp.int32(0))
    x = jax.eval_shape(work.embed, some)
    zeros = zeros_like(x)
    totals = {"sums": _zero_sums(work, zeros, some), "dshared": jax.tree.map(_wide_zeros, work.shared)}
    mode = backward_mode(program)(work, some)

    def pinned(state: State) -> State:
        dstacked, dshared = keep(state["dstacked"], state["dshared"])
        x, g = (jax.vmap(work.cut.pin)(state[kind]) for kind in "xg")
        return state | {"x": x, "g": g, "dstacked": dstacked, "dshared": dshared}

    like = {"x": x, "g": x, **mode.kept}
    state = {
        **{kind: buffer(tree, program.slots[kind]) for kind, tree in like.items()},
        "y": zeros,
        "dx": zeros,
        "dstacked": jax.tree.map(_wide_zeros, work.stacked),
        **totals,
    }
    state = _run(program, work, visit, mode.phases, pinned, state)
    return state["dstacked"], state["dshared"], jax.lax.psum(state["sums"], _AXIS)


def pipeline_forward(
    program: Program, layers_CRk: np.ndarray, work: Work, batch_M: Batch, result: Result
) -> tuple[Tree, Aux]:
    """Forward passes alone: what `result` makes of the last block's outputs, and the auxiliary terms.

    Both are summed over microbatches and ranks. Arguments are those of `pipeline_gradients`, but for:

    Args:
      program: of `schedules.forward`.
      result: `(shared, y, batch, ctx) -> pytree of arrays`, of one microbatch.
    """
    visit = _visits(program, layers_CRk, batch_M)

    def pinned(state: State) -> State:
        return state | {"x": jax.vmap(work.cut.pin)(state["x"])}

    some = visit(jnp.int32(0))
    x = jax.eval_shape(work.embed, some)
    _, sums = jax.eval_shape(partial(finished, work, result), x, some)
    state = {"x": buffer(x, program.slots["x"]), "y": zeros_like(x), "sums": zeros_like(sums)}
    state = _run(program, work, visit, {"F": forward_only(work, result)}, pinned, state)
    return jax.lax.psum(state["sums"], _AXIS)


def _run(
    program: Program,
    work: Work,
    visit: Callable[[jax.Array], Visit],
    phases: Mapping[str, Phase],
    pinned: Callable[[State], State],
    state: State,
) -> State:
    """All ticks, one after the other."""
    rank = jax.lax.axis_index(_AXIS)
    segments = program.segments()
    irregular = len(segments) > _MOST_SEGMENTS and not work.skip

    def phase(run: Phase, state: State, row: Row, at: Visit) -> State:
        return pinned(run(state, row, at))

    def tick(segment: Segment) -> Callable[[State, Row], tuple[State, None]]:
        def run(state: State, columns: Row) -> tuple[State, None]:
            row = {name: column[rank] for name, column in columns.items()}
            state = _delivered(state, row, {move: program.edges[move] for move in segment.moves}, rank)
            for name in segment.phases:
                at = visit(row[name])
                at = dataclasses.replace(
                    at,
                    first=at.first if name in segment.first else np.False_,
                    last=at.last if name in segment.last else np.False_,
                )
                go = partial(phase, phases[name], state, row, at)
                if irregular:  # all of the state goes through the branch, so that nothing overtakes it
                    with jax.named_scope(AGREED):
                        state = jax.lax.cond((columns[name] >= 0).any(), go, lambda state=state: state)
                else:
                    state = work.maybe(at.on, go, state)
            return pinned(state), None

        return run

    state = pinned(state)
    # Where phases are branches, no tick costs more for having all of them.
    for segment in [program.segment(0, program.schedule.ticks)] if work.skip or irregular else segments:
        columns: dict[str, Any] = {
            name: column[segment.start : segment.stop] for name, column in program.columns.items()
        }
        state, _ = jax.lax.scan(tick(segment), state, columns)
    return state


def _visits(program: Program, layers_CRk: np.ndarray, batch_M: Batch) -> Callable[[jax.Array], Visit]:
    """From an entry of the table to what it means on this rank; from an idle one, to some visit that is not `on`."""
    schedule, rank = program.schedule, jax.lax.axis_index(_AXIS)

    def visit(item: jax.Array) -> Visit:
        on = item >= 0
        chunk, m = jnp.divmod(jnp.maximum(item, 0), schedule.microbatches)
        stage = jnp.asarray(schedule.stage_RC)[rank, chunk]
        return Visit(
            on=on,
            first=on & (stage == 0),
            last=on & (stage == schedule.stages - 1),
            chunk=chunk,
            layers_k=jnp.asarray(layers_CRk)[chunk, rank],
            inputs=microbatch(batch_M, m),
        )

    return visit


def _delivered(state: State, row: Row, moves: Mapping[str, Edges], rank: jax.Array) -> State:
    """The messages of the last tick in their slots.

    A rank sends the one output (or gradient) that it has every way that anything goes; whom it is not meant for writes
    it where nobody reads.
    """
    arrived: dict[str, Any] = {}
    for move, edges in moves.items():
        kind, sent = move[0], state["y" if move[0] == "x" else "dx"]
        arrived[kind] = write(arrived.get(kind, state[kind]), row[move], _moved(sent, edges, rank))
    return state | arrived


def _moved(sent: Tree, edges: Edges, rank: jax.Array) -> Tree:
    """What arrives along the edges; without any, what a rank sends stays there.

    Ring placements close a ring, which goes as two permutes, each an open chain: XLA has miscompiled permutes with
    cycles on GPUs (openxla/xla#45222).
    """
    down, up = (tuple(e for e in edges if (e[0] < e[1]) == way) for way in (True, False))
    permuted = [jax.tree.map(lambda a, e=e: jax.lax.ppermute(a, _AXIS, e), sent) for e in (down, up) if e]
    if len(permuted) < 2:
        return permuted[0] if permuted else sent
    return select((rank == np.array([to for _, to in down])).any(), *permuted)


def _zero_sums(work: Work, x: Tree, visit: Visit) -> dict[str, tuple[jax.Array, jax.Array]]:
    def sums() -> dict[str, Any]:
        y, aux = work.stage(work.params(visit), x, visit)
        return joined(work.head(work.shared, y, visit), aux)

    return zeros_like(jax.eval_shape(sums))


def _wide_zeros(weight: jax.Array) -> jax.Array:
    return jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32))
