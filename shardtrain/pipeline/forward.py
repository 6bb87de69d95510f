"""The only phase of a schedule without a backward pass: a stage's input is dropped as soon as it was used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.nn.context import Context
from shardtrain.nn.model import Batch
from shardtrain.nn.stack import Aux
from shardtrain.pipeline.phases import Carry, Phase, TableRow, stage_input
from shardtrain.pipeline.slots import masked, zeros_like
from shardtrain.pipeline.stage import MicrobatchAtStage, StageFunctions

Tree = Any
#: `(shared, y, batch, ctx) -> pytree`, where `y` is the last block's output for one microbatch.
OutputFunction = Callable[[Tree, Tree, Batch, Context], Tree]


def forward_only(stage: StageFunctions, output: OutputFunction) -> Phase:
    """Make the phase F of a schedule without a backward pass, which adds outputs and auxiliary terms to `sums`.

    Args:
      stage: the functions of the stage.
      output: computes the outputs on the last stage.
    """

    def forward(carry: Carry, row: TableRow, mb: MicrobatchAtStage) -> Carry:
        y, sums = stage_output(stage, output, stage_input(stage, carry, row, mb), mb)
        return carry | {"y": y, "sums": jax.tree.map(jnp.add, carry["sums"], sums)}

    return forward


def stage_output(
    stage: StageFunctions, output: OutputFunction, x: Tree, mb: MicrobatchAtStage
) -> tuple[Tree, tuple[Tree, Aux]]:
    """Run a stage for one microbatch.

    Args:
      stage: the functions of the stage.
      output: computes the outputs on the last stage.
      x: the stage's input.
      mb: the microbatch.

    Returns:
      The stage's `y`, and the pair of outputs (zeros before the last stage) and auxiliary terms. The pair is zeros if
      the microbatch is not active.
    """
    y, aux = stage.forward(stage.params(mb), x, mb)
    return y, (output_of_last_stage(stage, output, y, mb), masked(mb.active, aux))


def output_of_last_stage(stage: StageFunctions, output: OutputFunction, y: Tree, mb: MicrobatchAtStage) -> Tree:
    """Compute the outputs from a stage's `y` if it is the last stage and active; else zeros.

    Args:
      stage: the functions of the stage.
      output: computes the outputs.
      y: the stage's output.
      mb: the microbatch.
    """

    def compute() -> Tree:
        return output(stage.shared, y, mb.batch, stage.context(mb))

    return stage.when(mb.last, compute, zeros_like(jax.eval_shape(compute)))
