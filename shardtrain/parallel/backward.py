"""The phases of a tick, in three ways to go backward.

- `remat`: F keeps the input of the stage, B computes the stage again.
- `save`: F keeps what its backward pass needs, B computes nothing again. What depends on parameters alone is not kept.
- `split`: I computes the stage again and the gradient of its input; W, later, the gradients of its parameters, from the
  operands that I kept. Needs a schedule with these phases.

Each phase is a function `(state, row) -> state` of the scan's state and this rank's row of the program's columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.parallel.schedules import Program
from shardtrain.parallel.slots import masked, read, select, write
from shardtrain.parallel.work import Visit, Work

Tree = Any
State = dict[str, Any]
Row = Mapping[str, jax.Array]
Phase = Callable[[State, Row], State]


@dataclasses.dataclass(frozen=True)
class Backward:
    """The phases of a backward mode.

    Attributes:
      phases: by name.
      kept: for each kind of buffer that only this mode has, shapes and dtypes of what a slot holds.
    """

    phases: Mapping[str, Phase]
    kept: Mapping[str, Tree] = dataclasses.field(default_factory=dict)


def remat(work: Work, visit: Callable[[jax.Array], Visit]) -> Backward:
    """Keep stage inputs."""

    def backward(state: State, row: Row) -> State:
        at = visit(row["B"])
        done, dparams = work.backward(work.params(at), read(state["x"], row["B_x"]), _gradient(state, row, "B_g"), at)
        return _sent(state, *done) | {"dstacked": work.add(state["dstacked"], dparams, at)}

    return Backward({"F": _forward(work, visit), "B": backward})


def split(work: Work, visit: Callable[[jax.Array], Visit]) -> Backward:
    """Keep stage inputs until I, and the operands of W from then on. The layers of a stage are unrolled."""
    halves = work.split_at_dx(visit(jnp.int32(0)))
    unrolled = dataclasses.replace(work, unrolled=True)

    def inputs(state: State, row: Row) -> State:
        at = visit(row["I"])
        x, g = read(state["x"], row["I_x"]), _gradient(state, row, "I_g")
        done, operands = halves.first(unrolled.params(at), (x, g, at))
        return _sent(state, *done) | {"w": write(state["w"], row["I_w"], operands)}

    def weights(state: State, row: Row) -> State:
        at = visit(row["W"])
        dparams = halves.second(unrolled.params(at), (), read(state["w"], row["W_w"]))
        return state | {"dstacked": unrolled.add(state["dstacked"], dparams, at)}

    return Backward({"F": _forward(work, visit), "I": inputs, "W": weights}, {"w": halves.kept})


def save(work: Work, visit: Callable[[jax.Array], Visit]) -> Backward:
    """Keep the residuals of stages. The last stage's loss is computed right after its forward pass."""
    halves = work.split_at_dy(visit(jnp.int32(0)))

    def forward(state: State, row: Row) -> State:
        at = visit(row["F"])
        x = select(at.first, work.embed(at), read(state["x"], row["F_x"]) if "F_x" in row else state["y"])
        (y, aux), residuals = halves.first(work.params(at), (x, at))
        dy, sums, dshared = work.loss(y, at)
        state = state | {"r": write(state["r"], row["F_r"], residuals), "g": write(state["g"], row["F_g"], dy)}
        return _sent(state, state["dx"], sums | masked(at.on, aux), dshared) | {"y": y}

    def backward(state: State, row: Row) -> State:
        at = visit(row["B"])
        dparams, dx = halves.second(work.params(at), read(state["g"], row["B_g"]), read(state["r"], row["B_r"]))
        dx = work.cut.pin(dx)
        state = _sent(state, dx, {}, work.embed_gradient(dx, at))
        return state | {"dstacked": work.add(state["dstacked"], dparams, at)}

    return Backward({"F": forward, "B": backward}, {"r": halves.kept})


def backward_mode(program: Program) -> Callable[[Work, Callable[[jax.Array], Visit]], Backward]:
    """The mode that a program was allocated for."""
    if "W" in program.schedule.phases:
        assert "W_w" in program.columns, "a split backward starts W from operands"
        return split
    return save if "F_r" in program.columns else remat


def _forward(work: Work, visit: Callable[[jax.Array], Visit]) -> Phase:
    def forward(state: State, row: Row) -> State:
        at = visit(row["F"])
        x = select(at.first, work.embed(at), read(state["x"], row["F_x"]))
        y, _ = work.stage(work.params(at), x, at)
        return state | {"x": write(state["x"], row["F_x"], x), "y": y}

    return forward


def _gradient(state: State, row: Row, column: str) -> Tree:
    """The gradient of a stage's output; anything where no stage ever gets one from another."""
    return read(state["g"], row[column]) if column in row else state["dx"]


def _sent(state: State, dx: Tree, sums: Tree, dshared: Tree) -> State:
    """With a gradient to send, and sums and gradients added up."""

    def add(total: jax.Array, d: jax.Array) -> jax.Array:
        return total + d.astype(total.dtype)

    return state | {
        "dx": dx,
        "sums": state["sums"] | {name: jax.tree.map(jnp.add, state["sums"][name], s) for name, s in sums.items()},
        "dshared": jax.tree.map(add, state["dshared"], dshared),
    }
