"""What the stages of a pipeline compute, as pure functions: no tables, no messages, no buffers.

By default every rank computes everything in every phase: also the embedding and the loss, which only the end stages
need, and also when it idles. What is not wanted is masked out of sums and gradients. A program that skips has branches
instead.

Shapes: C chunks of a rank, k layers of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.nn.context import Context
from shardtrain.nn.losses import Loss
from shardtrain.nn.model import Batch
from shardtrain.nn.stack import Aux
from shardtrain.pipeline.halve import Halves, halve
from shardtrain.pipeline.slots import add_at, masked, read_at, select

Tree = Any
#: What all stages add up: `sums`, and `dshared`, the gradient of the parameters that no stage owns.
Totals = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model cut for a pipeline, as pure functions of its parameters.

    Attributes:
      embed: `(shared, batch, ctx) -> x`, on the first stage.
      block: `(params of one layer, x, ctx) -> (x, aux)`.
      head: `(shared, x, batch, ctx) -> (loss_sum, weight_sum, metrics)`, on the last stage.
      remat: wraps a function so that its backward pass keeps what the model's remat policy says.
      pin: pins the layout of the pytree `x` between stages.
    """

    embed: Callable[[Tree, Batch, Context], Tree]
    block: Callable[[Tree, Tree, Context], tuple[Tree, Aux]]
    head: Callable[[Tree, Tree, Batch, Context], Loss]
    remat: Callable[[Callable[..., Any]], Callable[..., Any]]
    pin: Callable[[Tree], Tree] = lambda x: x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visit:
    """A microbatch at one of this rank's stages; that of an idle rank is made up.

    Attributes:
      on: whether it is real.
      first: whether it is real and the stage is the first; such a stage embeds. `np.False_` where that is known.
      last: whether it is real and the stage is the last; such a stage computes the loss. The same.
      chunk: the rank's chunk.
      layers_k: index of each layer of the stage in the model, -1 in a slot of no layer.
      inputs: the microbatch.
    """

    on: jax.Array
    first: jax.Array | np.bool_
    last: jax.Array | np.bool_
    chunk: jax.Array
    layers_k: jax.Array
    inputs: Batch


@dataclasses.dataclass(frozen=True)
class Work:
    """The parts of a forward and backward pass through a stage.

    Attributes:
      cut: the model.
      stacked: this rank's layers, `[C, k, ...]` each.
      shared: all other parameters, the same on all ranks.
      ctx: with key and train; layer and inputs are set here.
      aux_scales: what one unit of each auxiliary sum counts beside one of the loss sum; {} where nothing goes backward.
      skip: whether what is not wanted, such as what an idle rank does, is not computed.
    """

    cut: Cut
    stacked: Tree
    shared: Tree
    ctx: Context
    aux_scales: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    skip: bool = False

    def when(self, on: jax.Array | np.bool_, compute: Callable[[], Tree], otherwise: Tree) -> Tree:
        """What `compute` returns if `on` holds, else `otherwise`."""
        if isinstance(on, np.bool_) and not on:  # known while tracing
            return otherwise
        return jax.lax.cond(on, compute, lambda: otherwise) if self.skip else select(on, compute(), otherwise)

    def maybe(self, on: jax.Array | np.bool_, compute: Callable[[], Tree], otherwise: Tree) -> Tree:
        """What `compute` returns if `on` holds, else whatever is cheapest."""
        return jax.lax.cond(on, compute, lambda: otherwise) if self.skip else compute()

    def params(self, visit: Visit) -> Tree:
        """The parameters of the stage."""
        return jax.tree.map(lambda a: read_at(a, visit.chunk), self.stacked)

    def add(self, total: Tree, dparams: Tree, visit: Visit) -> Tree:
        """A gradient like `stacked`, with that of the stage added."""
        dparams = dparams if self.skip else masked(visit.on, dparams)
        return jax.tree.map(lambda t, d: add_at(t, d, visit.chunk), total, dparams)

    def embed(self, visit: Visit, shared: Tree | None = None) -> Tree:
        """The input of the first stage."""
        return self.cut.pin(self.cut.embed(shared or self.shared, visit.inputs, self._at(visit)))

    def layer(self, params: Tree, x: Tree, index: jax.Array, visit: Visit) -> tuple[Tree, Aux]:
        """One layer, and its auxiliary terms; with index -1 nothing."""
        y, aux = self.cut.block(params, x, self._at(visit).at_layer(index))
        return select(index >= 0, (y, aux), (x, jax.tree.map(jnp.zeros_like, aux)))

    def stage(self, params: Tree, x: Tree, visit: Visit) -> tuple[Tree, Aux]:
        """The layers of a stage, one after the other, and their summed auxiliary terms."""

        def layer(x: Tree, one: tuple[Tree, jax.Array]) -> tuple[Tree, Aux]:
            return self.layer(one[0], x, one[1], visit)

        x, aux = jax.lax.scan(self.cut.remat(layer), x, (params, visit.layers_k))
        return self.cut.pin(x), jax.tree.map(lambda a: a.sum(0), aux)

    def head(self, shared: Tree, y: Tree, visit: Visit) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The loss and the metrics of the last stage."""
        loss, weight, metrics = self.cut.head(shared, y, visit.inputs, self._at(visit))
        return {"loss": (loss, weight), **metrics}

    def loss(self, y: Tree, g: Tree, visit: Visit, totals: Totals) -> tuple[Tree, Totals]:
        """On the last stage the loss's gradient by `y`, elsewhere `g`; and the totals with the loss's added."""

        def loss(shared: Tree, y: Tree) -> tuple[jax.Array, dict[str, Any]]:
            sums = self.head(shared, y, visit)
            return sums["loss"][0], sums

        def compute() -> tuple[Tree, Totals]:
            _, back, sums = jax.vjp(loss, self.shared, y, has_aux=True)
            dshared, dy = back(jnp.ones_like(sums["loss"][0]))
            return self.cut.pin(dy), added(totals, sums, dshared)

        return self.when(visit.last, compute, (g, totals))

    def aux_gradient(self, aux: Aux) -> Aux:
        """The gradient of the loss sum by a stage's auxiliary terms."""
        return {name: (self.aux_scales[name].astype(s.dtype), jnp.zeros_like(w)) for name, (s, w) in aux.items()}

    def embed_gradient(self, dx: Tree, visit: Visit, totals: Totals) -> Totals:
        """`totals` with, on the first stage, the gradient of `shared` added."""

        def compute() -> Totals:
            _, back = jax.vjp(lambda shared: self.embed(visit, shared), self.shared)
            return added(totals, {}, back(dx)[0])

        return self.when(visit.first, compute, totals)

    def backward(
        self, params: Tree, x: Tree, g: Tree, visit: Visit, totals: Totals
    ) -> tuple[tuple[Tree, Totals], Tree]:
        """A stage computed again from its input, and back: `((dx, totals), gradient of params)`.

        `g` is the gradient of the stage's output, anything on the last stage.
        """
        (y, aux), back = jax.vjp(lambda p, x: self.stage(p, x, visit), params, x)
        dy, totals = self.loss(y, g, visit, totals)
        dparams, dx = back((dy, self.aux_gradient(aux)))
        dx = self.cut.pin(dx)
        totals = self.embed_gradient(dx, visit, added(totals, masked(visit.on, aux)))
        return (dx, totals), dparams

    def split_at_dy(self, some: Visit) -> Halves:
        """A stage and back, cut in two: `(params, (x, visit))` to `(y, aux)`; then, given dy, `(dparams, dx)`."""

        def whole(params: Tree, early: tuple[Tree, Visit], dy: Tree) -> tuple[Any, Any]:
            x, visit = early
            (y, aux), back = jax.vjp(lambda p, x: self.stage(p, x, visit), params, x)
            return (y, aux), back((dy, self.aux_gradient(aux)))

        x = jax.eval_shape(self.embed, some)
        return halve(whole, self.params(some), (x, some), x)

    def _at(self, visit: Visit) -> Context:
        return dataclasses.replace(self.ctx, inputs=visit.inputs)


def added(totals: Totals, sums: Tree, dshared: Tree | None = None) -> Totals:
    """`totals` with more sums, and a gradient of the shared parameters, added."""
    more = {name: jax.tree.map(jnp.add, totals["sums"][name], s) for name, s in sums.items()}
    wide = totals["dshared"]
    if dshared is not None:
        wide = jax.tree.map(lambda t, d: t + d.astype(t.dtype), wide, dshared)
    return {"sums": totals["sums"] | more, "dshared": wide}
