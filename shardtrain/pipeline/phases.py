"""The phases of a tick, for each of three backward modes.

- `remat`: F stores the stage's input, B computes the stage again.
- `save`: F stores the residuals of its backward pass, so B computes nothing again. Values that depend on parameters
  alone are not stored.
- `split`: I computes the stage again, and the gradient of its input; W, later, computes the gradients of its parameters
  from operands that I stored. It needs a schedule with these phases.

Each phase is a function `(carry, row, mb) -> carry`: the carry of the scan over ticks, this rank's row of the program's
columns, and the microbatch that the row names. A mode is made with an example of a microbatch, for its shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax

from shardtrain.errors import UserError, did_you_mean
from shardtrain.pipeline.schedules import Program, Schedule
from shardtrain.pipeline.slots import masked, read, write
from shardtrain.pipeline.split_backward import split_backward
from shardtrain.pipeline.stage import MicrobatchAtStage, StageFunctions, Totals, add_to_totals

Tree = Any
Carry = dict[str, Any]
TableRow = Mapping[str, jax.Array]
Phase = Callable[[Carry, TableRow, MicrobatchAtStage], Carry]


#: The backward modes of a schedule without W; one with W always uses `split`.
BackwardName = Literal["remat", "save"]


def check_backward(schedule: Schedule, backward: str) -> None:
    """Refuse a backward mode that does not exist, or that the schedule does not support.

    Args:
      schedule: the schedule.
      backward: name of the mode.

    Raises:
      UserError: the mode is refused; names both.
    """
    if backward not in get_args(BackwardName):
        fix = did_you_mean(backward, get_args(BackwardName))
        raise UserError("pipeline.backward", backward, "there is no such way to go backward", fix)
    if backward != "remat" and "W" in schedule.phases:
        rule = f"{schedule.name} splits the backward pass, and keeps the values that its second half needs"
        raise UserError("pipeline.backward", backward, rule, "drop pipeline.backward, or choose another schedule")


@dataclasses.dataclass(frozen=True)
class BackwardMode:
    """The phases of a backward mode.

    Attributes:
      phases: by name.
      buffers: shapes and dtypes of one slot, for each kind of buffer that only this mode has.
    """

    phases: Mapping[str, Phase]
    buffers: Mapping[str, Tree] = dataclasses.field(default_factory=dict)


def remat(stage: StageFunctions, _: MicrobatchAtStage) -> BackwardMode:
    """Store stage inputs."""

    def backward(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        x, g = read(carry["x"], row["B_x"]), _output_gradient(carry, row, "B_g")
        (dx, totals), dparams = stage.backward(stage.params(mb), x, g, mb, _totals(carry))
        return carry | totals | {"dx": dx, "dstacked": stage.accumulate(carry["dstacked"], dparams, mb)}

    return BackwardMode({"F": _forward(stage), "B": backward})


def split(stage: StageFunctions, example: MicrobatchAtStage) -> BackwardMode:
    """Store stage inputs until I, and the operands of W from then on."""
    backward = split_backward(stage, example)

    def input_gradient(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        x, g = read(carry["x"], row["I_x"]), _output_gradient(carry, row, "I_g")
        (dx, totals), operands = backward.input_gradient(stage.params(mb), x, g, mb, _totals(carry))
        return carry | totals | {"dx": dx, "w": write(carry["w"], row["I_w"], operands)}

    def weight_gradient(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        dparams = backward.weight_gradient(stage.params(mb), read(carry["w"], row["W_w"]))
        return carry | {"dstacked": stage.accumulate(carry["dstacked"], dparams, mb)}

    phases = {"F": _forward(stage), "I": input_gradient, "W": weight_gradient}
    return BackwardMode(phases, {"w": backward.operands})


def save(stage: StageFunctions, example: MicrobatchAtStage) -> BackwardMode:
    """Store the residuals of stages. The last stage computes the loss right after its forward pass."""
    halves = stage.split_forward_backward(example)

    def forward(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        x = stage_input(stage, carry, row, mb)
        (y, aux), residuals = halves.first(stage.params(mb), (x, mb))
        dy, totals = stage.loss(y, y, mb, _totals(carry))
        stored = {"r": write(carry["r"], row["F_r"], residuals), "g": write(carry["g"], row["F_g"], dy)}
        return carry | stored | add_to_totals(totals, masked(mb.active, aux)) | {"y": y}

    def backward(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        dparams, dx = halves.second(stage.params(mb), read(carry["g"], row["B_g"]), read(carry["r"], row["B_r"]))
        dx = stage.model.constrain(dx)
        totals = stage.embed_gradient(dx, mb, _totals(carry))
        return carry | totals | {"dx": dx, "dstacked": stage.accumulate(carry["dstacked"], dparams, mb)}

    return BackwardMode({"F": forward, "B": backward}, {"r": halves.residuals})


def backward_mode(program: Program) -> Callable[[StageFunctions, MicrobatchAtStage], BackwardMode]:
    """Return the mode that a program was allocated for."""
    if "W" in program.schedule.phases:
        assert "W_w" in program.columns, "a split backward starts W from operands"
        return split
    return save if "F_r" in program.columns else remat


def stage_input(stage: StageFunctions, carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Tree:
    """Return the embedding on the first stage, and what another rank has sent on the others.

    Where no stage ever receives anything from another, that is any value.
    """
    return stage.when(mb.first, lambda: stage.embed(mb), read(carry["x"], row["F_x"]) if "F_x" in row else carry["y"])


def _forward(stage: StageFunctions) -> Phase:
    def forward(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        x = stage_input(stage, carry, row, mb)
        # No stage waits for the output of the last one: B computes it again.
        y = stage.skip_unless(~mb.last, lambda: stage.forward(stage.params(mb), x, mb)[0], x)
        return carry | {"x": write(carry["x"], row["F_x"], x), "y": y}

    return forward


def _output_gradient(carry: Carry, row: TableRow, column: str) -> Tree:
    """The gradient of a stage's output; any value where no stage ever receives one from another."""
    return read(carry["g"], row[column]) if column in row else carry["dx"]


def _totals(carry: Carry) -> Totals:
    return {name: carry[name] for name in ("sums", "dshared")}
