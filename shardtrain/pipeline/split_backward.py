"""A stage's backward pass in two: I, which the stage before waits for, and W, weight gradients that nobody waits for.

Each layer is cut twice: where its output's gradient comes in, into a forward pass and the rest; and that rest, where
its input's gradient is known. So all are loops over layers, no larger for many of them, and no work is done twice.

Shapes: k layers of a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from shardtrain.pipeline.halve import halve
from shardtrain.pipeline.slots import masked
from shardtrain.pipeline.stage import Totals, Visit, Work, added

Tree = Any


@dataclasses.dataclass(frozen=True)
class Split:
    """A stage's I and W. Nothing is rematerialised within a layer.

    Attributes:
      inputs: `(params, x, g, visit, totals) -> ((dx, totals), operands)`, as `Work.backward`.
      weights: `(params, operands) -> dparams`.
      kept: shapes and dtypes of the operands, `[k, ...]` each.
    """

    inputs: Callable[[Tree, Tree, Tree, Visit, Totals], tuple[tuple[Tree, Totals], list[jax.Array]]]
    weights: Callable[[Tree, list[jax.Array]], Tree]
    kept: list[jax.ShapeDtypeStruct]


def split_stage(work: Work, some: Visit) -> Split:
    """Cut the layers of a stage. `some` is any visit."""
    x, layers = jax.eval_shape(work.embed, some), some.layers_k.shape[0]
    params = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], work.params(some)))

    def layer(params: Tree, early: Any, dy: Tree) -> tuple[Any, Any]:
        x, index, visit = early
        (y, aux), back = jax.vjp(lambda p, x: work.layer(p, x, index, visit), params, x)
        return (y, aux), back((dy, work.aux_gradient(aux)))

    forward = halve(layer, params, (x, some.layers_k[0], some), x)

    def rest(params: Tree, early: Any, _: Any) -> tuple[Tree, Tree]:
        dparams, dx = forward.second(params, *early)
        return dx, dparams

    backward = halve(rest, params, (x, forward.kept), ())
    # What W needs of the forward pass lies in its place already.
    before = len(jax.tree.leaves(x))
    as_it_was = [None if i is None or i < before else i - before for i in backward.early]

    def inputs(params: Tree, x: Tree, g: Tree, visit: Visit, totals: Totals) -> Any:
        def onward(x: Tree, one: Any) -> Any:
            params, index = one
            (y, aux), residuals = forward.first(params, (x, index, visit))
            return y, (aux, residuals)

        def back(dy: Tree, one: Any) -> Any:
            params, residuals = one
            dx, operands = backward.first(params, (dy, residuals))
            return dx, [a for a, i in zip(operands, as_it_was, strict=True) if i is None]

        y, (aux, residuals) = jax.lax.scan(onward, x, (params, visit.layers_k))
        dy, totals = work.loss(work.cut.pin(y), g, visit, totals)
        dx, new = jax.lax.scan(back, dy, (params, residuals), reverse=True)
        dx = work.cut.pin(dx)
        totals = added(totals, masked(visit.on, jax.tree.map(lambda a: a.sum(0), aux)))
        rest = iter(new)
        operands = [next(rest) if i is None else residuals[i] for i in as_it_was]
        return (dx, work.embed_gradient(dx, visit, totals)), operands

    def weights(params: Tree, operands: list[jax.Array]) -> Tree:
        def one(carry: None, layer: Any) -> tuple[None, Tree]:
            params, operands = layer
            return carry, backward.second(params, (), operands)

        return jax.lax.scan(one, None, (params, operands))[1]

    kept = [jax.ShapeDtypeStruct((layers, *a.shape), a.dtype) for a in backward.kept]
    return Split(inputs, weights, kept)
