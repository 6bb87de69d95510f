"""The phase of a tick where nothing goes backward: a stage's input is dropped as soon as it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.nn.context import Context
from shardtrain.nn.model import Batch
from shardtrain.nn.stack import Aux
from shardtrain.pipeline.phases import Phase, Row, State
from shardtrain.pipeline.slots import masked, read, zeros_like
from shardtrain.pipeline.stage import Visit, Work

Tree = Any
#: `(shared, y, batch, ctx)`, with the last block's output of a microbatch, to what is wanted of it.
Result = Callable[[Tree, Tree, Batch, Context], Tree]


def forward_only(work: Work, result: Result) -> Phase:
    """F of a schedule without a backward pass; adds up results and auxiliary terms in `sums`."""

    def forward(state: State, row: Row, at: Visit) -> State:
        x = work.when(at.first, lambda: work.embed(at), read(state["x"], row["F_x"]) if "F_x" in row else state["y"])
        y, sums = finished(work, result, x, at)
        return state | {"y": y, "sums": jax.tree.map(jnp.add, state["sums"], sums)}

    return forward


def finished(work: Work, result: Result, x: Tree, visit: Visit) -> tuple[Tree, tuple[Tree, Aux]]:
    """A stage's output, and of a real visit the result (on the last stage) and auxiliary terms, else zeros."""
    y, aux = work.stage(work.params(visit), x, visit)

    def found() -> Tree:
        return result(work.shared, y, visit.inputs, dataclasses.replace(work.ctx, inputs=visit.inputs))

    return y, (work.when(visit.last, found, zeros_like(jax.eval_shape(found))), masked(visit.on, aux))
