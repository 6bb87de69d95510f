"""The yardstick: a pipeline as MaxText and praxis build it, otherwise made of the library's own parts.

All stages run as one `vmap` over a dim that is sharded over `pipe`. From tick to tick `jnp.roll` moves that dim by one,
which the compiler turns into a permute. Autodiff reverses the loop: the backward pass starts when the last forward is
done, and until then its inputs are kept for every microbatch. Stages and the loss are rematerialised.

It trains the state of a pipelined `ModelDef` with one chunk per rank, so that the two can be compared.

Shapes: M microbatches, R ranks, k layers of a stage, T = M + R - 1 ticks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain import ModelDef, Partitioner, TrainState
from shardtrain.nn.context import Context
from shardtrain.pipeline.microbatches import microbatches
from shardtrain.sharding import use
from shardtrain.train.model_parts import model_parts, split_layers
from shardtrain.train.pipelined import PipelinedModel
from shardtrain.train.state import abstract_state

Tree = Any


def make_step(model: ModelDef, tx: optax.GradientTransformation, place: Partitioner) -> Any:
    """The jitted `(state, batch) -> (state, loss)`; the state is donated."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, place))

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, jax.Array]:
        with use(place):
            key = jax.random.fold_in(jax.random.key(0), state.step)
            loss, grads = jax.value_and_grad(mean_loss, argnums=1)(model, state.params, batch, key, place)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(state.step + 1, params, {}, opt_state, state.skipped, state.skipped_in_row), loss

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, place.sharding(())))


def mean_loss(model: ModelDef, params: Tree, batch: Tree, key: jax.Array, place: Partitioner) -> jax.Array:
    """The loss over the global batch. Auxiliary terms are left out."""
    pipelined = model.execution
    assert isinstance(pipelined, PipelinedModel)
    R, M = pipelined.program.schedule.ranks, pipelined.program.schedule.microbatches
    parts = model_parts(model, lambda x: x)
    stacked, shared = split_layers(params)
    stages_R = jax.tree.map(lambda a: a[0], stacked)  # [1, R, k, ...]
    layers_Rk = jnp.asarray(pipelined.layers_CRk[0])
    batch_M = jax.tree.map(
        lambda a: place.constrain(jnp.swapaxes(a, 0, 1), None, "batch", *[None] * (a.ndim - 2)),
        microbatches(batch, M, "pipeline.microbatches"),
    )

    def context(m: jax.Array) -> Context:
        return Context(jax.tree.map(lambda a: a[jnp.clip(m, 0, M - 1)], batch_M), key=key, train=True)

    def embed(m: jax.Array) -> jax.Array:
        ctx = context(m)
        return parts.embed(shared, ctx.inputs, ctx)

    @partial(jax.vmap, spmd_axis_name="pipe")
    @jax.checkpoint
    def stage(params: Tree, layers_k: jax.Array, x: jax.Array, m: jax.Array) -> jax.Array:
        ctx = context(m)

        def layer(x: jax.Array, one: tuple[Tree, jax.Array]) -> tuple[jax.Array, None]:
            params, index = one
            y, _ = parts.block(params, x, ctx.at_layer(index))
            return jnp.where(index >= 0, y, x), None

        return jax.lax.scan(parts.remat(layer), x, (params, layers_k))[0]

    @jax.checkpoint
    def head(y: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        ctx = context(m)
        return parts.head(shared, y, ctx.inputs, ctx)["loss"]

    def constrain(x_R: jax.Array) -> jax.Array:
        return place.constrain(x_R, "stages", "batch", "seq", None)

    def tick(x_R: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_R = constrain(jnp.roll(x_R, 1, axis=0).at[0].set(embed(t)))
        y_R = constrain(stage(stages_R, layers_Rk, x_R, t - jnp.arange(R)))
        return y_R, y_R[-1]

    def add(total: tuple[jax.Array, jax.Array], one: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, head(*one)), None

    x = jax.eval_shape(embed, jnp.int32(0))
    _, y_T = jax.lax.scan(tick, constrain(jnp.zeros((R, *x.shape), x.dtype)), jnp.arange(M + R - 1))
    zero = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
    (loss, weight), _ = jax.lax.scan(add, (zero, zero), (y_T[R - 1 :], jnp.arange(M)))
    return loss / weight
