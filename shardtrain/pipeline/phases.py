"""The phases of a tick, in three ways to go backward.

- `remat`: F keeps the input of the stage, B computes the stage again.
- `save`: F keeps what its backward pass needs, B computes nothing again. What depends on parameters alone is not kept.
- `split`: I computes the stage again and the gradient of its input; W, later, the gradients of its parameters, from the
  operands that I kept. Needs a schedule with these phases.

Each phase is a function `(state, row, visit) -> state` of the scan's state, this rank's row of the program's columns,
and what that means. A mode is made with some visit, for its shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax

from shardtrain.errors import UserError, did_you_mean
from shardtrain.pipeline.schedules import Program, Schedule
from shardtrain.pipeline.slots import masked, read, write
from shardtrain.pipeline.split_backward import split_stage
from shardtrain.pipeline.stage import Totals, Visit, Work, added

Tree = Any
State = dict[str, Any]
Row = Mapping[str, jax.Array]
Phase = Callable[[State, Row, Visit], State]


#: How a schedule without W goes backward; one with W always does it by `split`.
BackwardName = Literal["remat", "save"]


def check_backward(schedule: Schedule, backward: str) -> None:
    """Refuse a way to go backward that does not exist, or that the schedule cannot take.

    Raises:
      UserError: names both.
    """
    if backward not in get_args(BackwardName):
        fix = did_you_mean(backward, get_args(BackwardName))
        raise UserError("pipeline.backward", backward, "there is no such way to go backward", fix)
    if backward != "remat" and "W" in schedule.phases:
        rule = f"{schedule.name} splits the backward pass, and keeps the values that its second half needs"
        raise UserError("pipeline.backward", backward, rule, "drop pipeline.backward, or choose another schedule")


@dataclasses.dataclass(frozen=True)
class Backward:
    """The phases of a backward mode.

    Attributes:
      phases: by name.
      kept: for each kind of buffer that only this mode has, shapes and dtypes of what a slot holds.
    """

    phases: Mapping[str, Phase]
    kept: Mapping[str, Tree] = dataclasses.field(default_factory=dict)


def remat(work: Work, _: Visit) -> Backward:
    """Keep stage inputs."""

    def backward(state: State, row: Row, at: Visit) -> State:
        x, g = read(state["x"], row["B_x"]), _gradient(state, row, "B_g")
        (dx, totals), dparams = work.backward(work.params(at), x, g, at, _totals(state))
        return state | totals | {"dx": dx, "dstacked": work.add(state["dstacked"], dparams, at)}

    return Backward({"F": _forward(work), "B": backward})


def split(work: Work, some: Visit) -> Backward:
    """Keep stage inputs until I, and the operands of W from then on."""
    stage = split_stage(work, some)

    def inputs(state: State, row: Row, at: Visit) -> State:
        x, g = read(state["x"], row["I_x"]), _gradient(state, row, "I_g")
        (dx, totals), operands = stage.inputs(work.params(at), x, g, at, _totals(state))
        return state | totals | {"dx": dx, "w": write(state["w"], row["I_w"], operands)}

    def weights(state: State, row: Row, at: Visit) -> State:
        dparams = stage.weights(work.params(at), read(state["w"], row["W_w"]))
        return state | {"dstacked": work.add(state["dstacked"], dparams, at)}

    return Backward({"F": _forward(work), "I": inputs, "W": weights}, {"w": stage.kept})


def save(work: Work, some: Visit) -> Backward:
    """Keep the residuals of stages. The last stage's loss is computed right after its forward pass."""
    halves = work.split_at_dy(some)

    def forward(state: State, row: Row, at: Visit) -> State:
        x = work.when(at.first, lambda: work.embed(at), read(state["x"], row["F_x"]) if "F_x" in row else state["y"])
        (y, aux), residuals = halves.first(work.params(at), (x, at))
        dy, totals = work.loss(y, y, at, _totals(state))
        kept = {"r": write(state["r"], row["F_r"], residuals), "g": write(state["g"], row["F_g"], dy)}
        return state | kept | added(totals, masked(at.on, aux)) | {"y": y}

    def backward(state: State, row: Row, at: Visit) -> State:
        dparams, dx = halves.second(work.params(at), read(state["g"], row["B_g"]), read(state["r"], row["B_r"]))
        dx = work.cut.pin(dx)
        totals = work.embed_gradient(dx, at, _totals(state))
        return state | totals | {"dx": dx, "dstacked": work.add(state["dstacked"], dparams, at)}

    return Backward({"F": forward, "B": backward}, {"r": halves.kept})


def backward_mode(program: Program) -> Callable[[Work, Visit], Backward]:
    """The mode that a program was allocated for."""
    if "W" in program.schedule.phases:
        assert "W_w" in program.columns, "a split backward starts W from operands"
        return split
    return save if "F_r" in program.columns else remat


def _forward(work: Work) -> Phase:
    def forward(state: State, row: Row, at: Visit) -> State:
        x = work.when(at.first, lambda: work.embed(at), read(state["x"], row["F_x"]))
        # Nobody waits for what the last stage would return: B computes it again.
        y = work.maybe(~at.last, lambda: work.stage(work.params(at), x, at)[0], x)
        return state | {"x": write(state["x"], row["F_x"], x), "y": y}

    return forward


def _gradient(state: State, row: Row, column: str) -> Tree:
    """The gradient of a stage's output; anything where no stage ever gets one from another."""
    return read(state["g"], row[column]) if column in row else state["dx"]


def _totals(state: State) -> Totals:
    return {name: state[name] for name in ("sums", "dshared")}
