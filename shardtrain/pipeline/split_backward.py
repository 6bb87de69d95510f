"""A stage's backward pass in two parts: I, which the previous stage waits for, and W, weight gradients.

Each layer is split twice: where its output's gradient arrives, into a forward pass and the rest; and that rest, where
its input's gradient is known. So all parts are loops over layers, the program does not grow with their number, and
nothing is computed twice.

Shapes: k layers of a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from shardtrain.pipeline.slots import masked
from shardtrain.pipeline.split_function import split_function
from shardtrain.pipeline.stage import MicrobatchAtStage, StageFunctions, Totals, add_to_totals
from shardtrain.weights.trained import merged

Tree = Any


@dataclasses.dataclass(frozen=True)
class SplitBackward:
    """The phases I and W of a stage. Nothing is rematerialised within a layer.

    Attributes:
      input_gradient: `(params, x, g, mb, totals) -> ((dx, totals), operands)`, as `StageFunctions.backward`.
      weight_gradient: `(params, operands) -> dparams`.
      operands: shapes and dtypes of the operands, `[k, ...]` each.
    """

    input_gradient: Callable[[Tree, Tree, Tree, MicrobatchAtStage, Totals], tuple[tuple[Tree, Totals], list[jax.Array]]]
    weight_gradient: Callable[[Tree, list[jax.Array]], Tree]
    operands: list[jax.ShapeDtypeStruct]


def split_backward(stage: StageFunctions, example: MicrobatchAtStage) -> SplitBackward:
    """Split the backward pass of a stage's layers.

    Args:
      stage: the functions of the stage.
      example: any microbatch, for its shapes.
    """
    x, layers = jax.eval_shape(stage.embed, example), example.layers_k.shape[0]
    params = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], stage.params(example)))

    def layer(params: Tree, early: Any, dy: Tree) -> tuple[Any, Any]:
        (x, index, mb), part = early, stage.model.trained_layer(params)
        (y, aux), back = jax.vjp(lambda part, x: stage.layer(merged(part, params), x, index, mb), part, x)
        return (y, aux), back((dy, stage.aux_gradient(aux)))

    forward = split_function(layer, params, (x, example.layers_k[0], example), x)

    def rest(params: Tree, early: Any, _: Any) -> tuple[Tree, Tree]:
        dparams, dx = forward.second(params, *early)
        return dx, dparams

    backward = split_function(rest, params, (x, forward.residuals), ())
    # An operand of W that is a residual of the forward pass is stored already.
    n_dy = len(jax.tree.leaves(x))
    residual_of = [None if i is None or i < n_dy else i - n_dy for i in backward.arguments]

    def input_gradient(params: Tree, x: Tree, g: Tree, mb: MicrobatchAtStage, totals: Totals) -> Any:
        def onward(x: Tree, one: Any) -> Any:
            params, index = one
            (y, aux), residuals = forward.first(params, (x, index, mb))
            return y, (aux, residuals)

        def back(dy: Tree, one: Any) -> Any:
            params, residuals = one
            dx, operands = backward.first(params, (dy, residuals))
            return dx, [a for a, i in zip(operands, residual_of, strict=True) if i is None]

        y, (aux, residuals) = jax.lax.scan(onward, x, (params, mb.layers_k))
        dy, totals = stage.loss(stage.model.constrain(y), g, mb, totals)
        dx, new = jax.lax.scan(back, dy, (params, residuals), reverse=True)
        dx = stage.model.constrain(dx)
        totals = add_to_totals(totals, masked(mb.active, jax.tree.map(lambda a: a.sum(0), aux)))
        rest = iter(new)
        operands = [next(rest) if i is None else residuals[i] for i in residual_of]
        return (dx, stage.embed_gradient(dx, mb, totals)), operands

    def weight_gradient(params: Tree, operands: list[jax.Array]) -> Tree:
        def one(carry: None, layer: Any) -> tuple[None, Tree]:
            params, operands = layer
            return carry, backward.second(params, (), operands)

        return jax.lax.scan(one, None, (params, operands))[1]

    shapes = [jax.ShapeDtypeStruct((layers, *a.shape), a.dtype) for a in backward.residuals]
    return SplitBackward(input_gradient, weight_gradient, shapes)
