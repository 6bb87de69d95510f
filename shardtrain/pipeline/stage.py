"""The computation of a pipeline stage, as pure functions: no tables, no messages, no buffers.

By default every rank computes everything in every phase, even when it is idle: also the embedding and the loss, which
only the first and the last stage need. Unwanted results are masked out of sums and gradients. A program that skips has
branches instead.

Shapes: C chunks of a rank, k layers of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.nn.cache import Cache
from shardtrain.nn.context import Context
from shardtrain.nn.model import Batch
from shardtrain.nn.returned import Sums
from shardtrain.nn.stack import Aux
from shardtrain.pipeline.slots import add_at, masked, read_at, select
from shardtrain.pipeline.split_function import SplitFunction, split_function
from shardtrain.weights.trained import merged

Tree = Any
#: The totals over all stages and microbatches: `sums`, and `dshared`, the gradient of the shared parameters.
Totals = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """The parts of a model that a pipeline runs, as pure functions of its parameters.

    Attributes:
      embed: `(shared, batch, ctx) -> x`, on the first stage.
      block: `(params of one layer, x, ctx) -> (x, aux)`.
      head: `(shared, x, batch, ctx) -> {name: (sum, weight)}`, of the loss and metrics, on the last stage.
      remat: wraps a function so that its backward pass keeps only what the model's remat policy names.
      constrain: sets the sharding of the pytree `x` between stages.
      trained_layer: the part of the parameters of layers that trains: nested dicts without the frozen ones.
      trained_shared: the same of the shared parameters.
    """

    embed: Callable[[Tree, Batch, Context], Tree]
    block: Callable[[Tree, Tree, Context], tuple[Tree, Aux]]
    head: Callable[[Tree, Tree, Batch, Context], Sums]
    remat: Callable[[Callable[..., Any]], Callable[..., Any]]
    constrain: Callable[[Tree], Tree] = lambda x: x
    trained_layer: Callable[[Tree], Tree] = lambda params: params
    trained_shared: Callable[[Tree], Tree] = lambda shared: shared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MicrobatchAtStage:
    """A microbatch at one of this rank's stages. On an idle rank it is a placeholder, which is not `active`.

    Attributes:
      active: whether the rank really has this microbatch.
      first: whether it is active and the stage is the first one, which embeds; `np.False_` if known while tracing.
      last: whether it is active and the stage is the last one, which computes the loss; `np.False_` likewise.
      chunk: the rank's chunk.
      layers_k: the index in the model of each layer of the stage; -1 for a padded slot.
      batch: the rows of the microbatch.
    """

    active: jax.Array
    first: jax.Array | np.bool_
    last: jax.Array | np.bool_
    chunk: jax.Array
    layers_k: jax.Array
    batch: Batch


@dataclasses.dataclass(frozen=True)
class StageFunctions:
    """The forward and backward pass of a stage, with this rank's parameters.

    Attributes:
      model: the model's parts.
      stacked: this rank's layers, `[C, k, ...]` each.
      shared: all other parameters, the same on all ranks.
      ctx: with key and train; layer and inputs are set here.
      aux_scales: the weight of one unit of each auxiliary sum relative to the loss sum; {} without a backward pass.
      skip: whether unneeded work, such as that of an idle rank, is skipped by a branch.
    """

    model: ModelParts
    stacked: Tree
    shared: Tree
    ctx: Context
    aux_scales: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    skip: bool = False

    def when(self, condition: jax.Array | np.bool_, compute: Callable[[], Tree], otherwise: Tree) -> Tree:
        """Return `compute()` if `condition` holds, else `otherwise`."""
        if isinstance(condition, np.bool_) and not condition:  # known while tracing
            return otherwise
        if self.skip:
            return jax.lax.cond(condition, compute, lambda: otherwise)
        return select(condition, compute(), otherwise)

    def skip_unless(self, needed: jax.Array | np.bool_, compute: Callable[[], Tree], otherwise: Tree) -> Tree:
        """Return `compute()` if `needed` holds, else whichever value is cheapest."""
        return jax.lax.cond(needed, compute, lambda: otherwise) if self.skip else compute()

    def params(self, mb: MicrobatchAtStage) -> Tree:
        """Return the parameters of the stage's layers, `[k, ...]` each."""
        return jax.tree.map(lambda a: read_at(a, mb.chunk), self.stacked)

    def accumulate(self, total: Tree, dparams: Tree, mb: MicrobatchAtStage) -> Tree:
        """Add `dparams`, the gradient of the parameters of a stage that train, to `total`, that of all stages here."""
        dparams = dparams if self.skip else masked(mb.active, dparams)
        return jax.tree.map(lambda t, d: add_at(t, d, mb.chunk), total, dparams)

    def embed(self, mb: MicrobatchAtStage, shared: Tree | None = None) -> Tree:
        """Compute the input of the first stage, with the parameters `shared` if they are given."""
        return self.model.constrain(self.model.embed(shared or self.shared, mb.batch, self.context(mb)))

    def layer(self, params: Tree, x: Tree, index: jax.Array, mb: MicrobatchAtStage) -> tuple[Tree, Aux]:
        """Apply one layer; return `x` and its auxiliary terms. With index -1 nothing changes."""
        y, aux = self.model.block(params, x, self.context(mb).at_layer(index))
        return select(index >= 0, (y, aux), (x, jax.tree.map(jnp.zeros_like, aux)))

    def forward(self, params: Tree, x: Tree, mb: MicrobatchAtStage) -> tuple[Tree, Aux]:
        """Apply the layers of a stage one after the other; return `x` and their summed auxiliary terms."""

        def layer(x: Tree, one: tuple[Tree, jax.Array]) -> tuple[Tree, Aux]:
            return self.layer(one[0], x, one[1], mb)

        x, aux = jax.lax.scan(self.model.remat(layer), x, (params, mb.layers_k))
        return self.model.constrain(x), jax.tree.map(lambda a: a.sum(0), aux)

    def extend(self, params: Tree, x: Tree, past: Tree, mb: MicrobatchAtStage) -> tuple[Tree, Tree]:
        """Apply the layers of a stage to new tokens of a text; see `Stack.extend`. No auxiliary terms are computed."""

        def layer(x: Tree, one: tuple[Tree, jax.Array, Tree]) -> tuple[Tree, Tree]:
            params, index, past = one
            cache = Cache(past)
            y, _ = self.model.block(params, x, dataclasses.replace(self.context(mb).at_layer(index), cache=cache))
            return select(index >= 0, y, x), tuple(cache.kept)

        x, kept = jax.lax.scan(layer, x, (params, mb.layers_k, past))
        return self.model.constrain(x), kept

    def head(self, shared: Tree, y: Tree, mb: MicrobatchAtStage) -> Sums:
        """Compute the loss and the metrics from the last stage's output `y`, as `{name: (sum, weight)}`."""
        return self.model.head(shared, y, mb.batch, self.context(mb))

    def loss(self, y: Tree, g: Tree, mb: MicrobatchAtStage, totals: Totals) -> tuple[Tree, Totals]:
        """Return the gradient of the stage's output `y`, and `totals`.

        On the last stage it is the gradient of the loss, which is added to `totals`; elsewhere it is `g`.
        """

        def loss(part: Tree, y: Tree) -> tuple[jax.Array, dict[str, Any]]:
            sums = self.head(merged(part, self.shared), y, mb)
            return sums["loss"][0], sums

        def compute() -> tuple[Tree, Totals]:
            _, back, sums = jax.vjp(loss, self.model.trained_shared(self.shared), y, has_aux=True)
            dshared, dy = back(jnp.ones_like(sums["loss"][0]))
            return self.model.constrain(dy), add_to_totals(totals, sums, dshared)

        return self.when(mb.last, compute, (g, totals))

    def aux_gradient(self, aux: Aux) -> Aux:
        """Return the gradient of the loss sum with respect to a stage's auxiliary terms."""
        return {name: (self.aux_scales[name].astype(s.dtype), jnp.zeros_like(w)) for name, (s, w) in aux.items()}

    def embed_gradient(self, dx: Tree, mb: MicrobatchAtStage, totals: Totals) -> Totals:
        """On the first stage, add the embedding's gradient to `totals`, given the gradient `dx` of its output."""

        def compute() -> Totals:
            part = self.model.trained_shared(self.shared)
            _, back = jax.vjp(lambda part: self.embed(mb, merged(part, self.shared)), part)
            return add_to_totals(totals, {}, back(dx)[0])

        return self.when(mb.first, compute, totals)

    def backward(
        self, params: Tree, x: Tree, g: Tree, mb: MicrobatchAtStage, totals: Totals
    ) -> tuple[tuple[Tree, Totals], Tree]:
        """Recompute a stage from its input and go back through it.

        Args:
          params: parameters of the stage's layers.
          x: the stage's input.
          g: the gradient of the stage's output; any value on the last stage.
          mb: the microbatch.
          totals: sums and shared gradients so far.

        Returns:
          `((dx, totals), gradient of those params that train)`.
        """
        part = self.model.trained_layer(params)
        (y, aux), back = jax.vjp(lambda part, x: self.forward(merged(part, params), x, mb), part, x)
        dy, totals = self.loss(y, g, mb, totals)
        dparams, dx = back((dy, self.aux_gradient(aux)))
        dx = self.model.constrain(dx)
        totals = self.embed_gradient(dx, mb, add_to_totals(totals, masked(mb.active, aux)))
        return (dx, totals), dparams

    def split_forward_backward(self, example: MicrobatchAtStage) -> SplitFunction:
        """Split a stage's forward and backward pass where the gradient of its output arrives.

        Args:
          example: any microbatch, for its shapes.

        Returns:
          First `(params, (x, mb)) -> (y, aux)`; then, given dy, `-> (dparams, dx)`.
        """

        def both(params: Tree, early: tuple[Tree, MicrobatchAtStage], dy: Tree) -> tuple[Any, Any]:
            (x, mb), part = early, self.model.trained_layer(params)
            (y, aux), back = jax.vjp(lambda part, x: self.forward(merged(part, params), x, mb), part, x)
            return (y, aux), back((dy, self.aux_gradient(aux)))

        x = jax.eval_shape(self.embed, example)
        return split_function(both, self.params(example), (x, example), x)

    def context(self, mb: MicrobatchAtStage) -> Context:
        """Return the context of a microbatch, before it is at a layer."""
        return dataclasses.replace(self.ctx, inputs=mb.batch)


def add_to_totals(totals: Totals, sums: Tree, dshared: Tree | None = None) -> Totals:
    """Add `sums`, and `dshared`, a gradient of the shared parameters, to `totals`."""
    more = {name: jax.tree.map(jnp.add, totals["sums"][name], s) for name, s in sums.items()}
    wide = totals["dshared"]
    if dshared is not None:
        wide = jax.tree.map(lambda t, d: t + d.astype(t.dtype), wide, dshared)
    return {"sums": totals["sums"] | more, "dshared": wide}
