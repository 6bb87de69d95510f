"""Gradients of the global batch: microbatches, auxiliary terms, and one reduction over `data` at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from shardtrain.nn.context import Context
from shardtrain.nn.losses import Loss
from shardtrain.nn.model import Batch, Model, forward
from shardtrain.sharding import Partitioner
from shardtrain.state import ModelDef, TrainState, Tree

LossFunction = Callable[[nnx.Module, Batch, Context], Loss]
#: name -> (sum, weight); always with "loss".
Sums = dict[str, tuple[jax.Array, jax.Array]]

#: Mesh axes over which gradients are reduced by hand, once per step.
_MANUAL = ("island", "data")


def batch_gradients(
    model: ModelDef,
    loss: LossFunction | None,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    partitioner: Partitioner,
    accumulate: int,
    reduce_dtype: Any,
) -> tuple[Tree, Sums, Tree]:
    """Gradients of the mean loss over the global batch, the sums behind it, and the model's new state.

    The loss is `loss_sum / weight_sum` plus each auxiliary `sum / weight`, every quotient over the *global* batch.
    A model that follows `nn.Model` runs in a region that is manual over `data` and `island`: there each device group
    sums its own rows' gradients over the microbatches, and one reduction at the end adds them up. A module with its
    own `loss` runs outside of any manual region, so that what it does over the batch (BatchNorm) sees all of it.
    """
    manual = [axis for axis in _MANUAL if partitioner.mesh.shape[axis] > 1] if loss is None else []
    total = partial(jax.lax.psum, axis_name=manual) if manual else lambda x: x

    def local(params: Tree, model_state: Tree, batch: Batch) -> tuple[Tree, Sums, Tree]:
        scales = _aux_scales(model, loss, params, batch, total)

        def gradient(batch: Batch, key: jax.Array) -> tuple[Tree, tuple[Sums, Tree]]:
            def objective(params: Tree) -> tuple[jax.Array, tuple[Sums, Tree]]:
                sums, aux, new_state = _sums(model, loss, params, model_state, batch, key, train=True)
                value = sums["loss"][0] + sum(s * scales[name] for name, (s, _) in aux.items())
                return value, (sums | aux, new_state)

            grads, rest = jax.grad(objective, has_aux=True)(params)
            return jax.tree.map(keep, grads, model.weights), rest

        def keep(grad: jax.Array, weight: Any) -> jax.Array:
            wide = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
            return partitioner.constrain(wide, *weight.axes)

        if accumulate == 1:
            grads, (sums, new_state) = gradient(batch, key)
        else:
            micro = microbatches(batch, accumulate)

            def body(carry: Any, one: tuple[Batch, jax.Array]) -> tuple[Any, None]:
                mb, index = one
                # Contract models draw their bits from row numbers; only a module's own streams need another key.
                grads, (sums, _) = gradient(mb, key if loss is None else jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, carry, (grads, sums)), None

            shapes = jax.eval_shape(lambda: gradient(jax.tree.map(lambda a: a[0], micro), key))
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], shapes[1][0]))
            zeros = (jax.tree.map(keep, zeros[0], model.weights), zeros[1])
            (grads, sums), _ = jax.lax.scan(body, zeros, (micro, jnp.arange(accumulate)))
            new_state = model_state
        if manual:
            grads = jax.tree.map(lambda g: total(g.astype(_reduced(g, reduce_dtype))).astype(g.dtype), grads)
            sums = total(sums)
        return grads, sums, new_state

    run = local
    if manual:
        batch_spec = PartitionSpec(tuple(manual))
        run = jax.shard_map(
            local,
            mesh=partitioner.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), batch_spec),
            out_specs=PartitionSpec(),
            axis_names=set(manual),
            check_vma=False,  # other axes stay Auto (research/pipeline.md, sharp edge 3)
        )
    grads, sums, new_state = run(state.params, state.model_state, batch)
    weight = sums["loss"][1]
    grads = jax.tree.map(lambda g, w: (g / weight.astype(g.dtype)).astype(w.dtype), grads, model.weights)
    return grads, sums, new_state


def batch_sums(model: ModelDef, loss: LossFunction | None, state: TrainState, batch: Batch) -> Sums:
    """The evaluation sums of one batch: loss, metrics and auxiliary terms."""
    sums, aux, _ = _sums(model, loss, state.params, state.model_state, batch, None, train=False)
    return sums | aux


def microbatches(batch: Batch, count: int) -> Batch:
    """`[B, ...]` leaves as `[count, B / count, ...]`: microbatch m is the rows `m::count`, so no row moves."""

    def split(a: jax.Array) -> jax.Array:
        return jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _sums(
    model: ModelDef,
    loss: LossFunction | None,
    params: Tree,
    model_state: Tree,
    batch: Batch,
    key: jax.Array | None,
    *,
    train: bool,
) -> tuple[Sums, Sums, Tree]:
    module = model.merge(params, model_state, key)
    ctx = Context(inputs=batch, key=key, train=train)
    if loss is None:
        (loss_sum, weight, metrics), aux = forward(cast(Model, module), batch, ctx)
    else:
        module.train() if train else module.eval()
        (loss_sum, weight, metrics), aux = loss(module, batch, ctx), {}
    return {"loss": (loss_sum, weight), **metrics}, aux, model.model_state(module)


def _aux_scales(
    model: ModelDef, loss: LossFunction | None, params: Tree, batch: Batch, total: Callable[..., Any]
) -> dict[str, jax.Array]:
    """How much one unit of each auxiliary sum counts beside one of the loss sum: ratio of their global weights.

    Gradients are divided by the loss's weight at the very end, while microbatches add up sums: so the ratio has to be
    known first. Weights depend on the batch alone; the compiler drops the rest of this forward pass.
    """
    if loss is not None:
        return {}
    forward_sums = partial(_sums, model, None, params, {}, batch, None, train=False)
    if not jax.eval_shape(lambda: forward_sums()[1]):
        return {}
    sums, aux, _ = forward_sums()
    weight, weights = total((sums["loss"][1], {name: w for name, (_, w) in aux.items()}))
    return {name: jax.lax.stop_gradient(weight / w) for name, w in weights.items()}


def _reduced(grad: jax.Array, reduce_dtype: Any) -> Any:
    # float64 parameters are reduced in float64: the policy narrows gradients only below their own float32 sums.
    return reduce_dtype if grad.dtype == jnp.float32 else grad.dtype
