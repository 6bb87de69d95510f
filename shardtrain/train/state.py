"""The state of a training run, from a model's declarations to sharded arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.errors import require_kind
from shardtrain.launch.cpu_collectives import ordered
from shardtrain.optim import state_shardings
from shardtrain.sharding import Partitioner, use
from shardtrain.train.model_def import ModelDef
from shardtrain.train.split_module import Tree
from shardtrain.weights.layout import shardings_like
from shardtrain.weights.paths import dotted
from shardtrain.weights.precision import at_least_float32
from shardtrain.weights.trained import trained
from shardtrain.weights.weight import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes; a pytree.

    Attributes:
      step: int32 scalar, number of updates tried so far.
      params: the model's weights, nested dicts.
      model_state: other variables that the forward pass changes (BatchNorm statistics, ...); usually empty.
      opt_state: the optimizer's own state, of the weights that train.
      skipped: int32 scalar, number of updates skipped because loss or gradient was not finite.
      skipped_in_row: the same, since the last applied update.
      ema: a moving average of the weights that train, if there is one; see `averages.py`.
    """

    step: jax.Array
    params: Tree
    model_state: Tree
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_row: jax.Array
    ema: Tree = dataclasses.field(default_factory=dict)


def abstract_state(
    model: ModelDef, tx: optax.GradientTransformation, partitioner: Partitioner, *, ema: bool = False
) -> TrainState:
    """The state that `init_state` makes, as `ShapeDtypeStruct`s with shardings.

    Args:
      model: the definition of the model.
      tx: the optimizer.
      partitioner: the mesh and its rules.
      ema: whether there is also a moving average of the weights, see `start_ema`.

    Raises:
      UserError: an argument of another kind; a schedule that does not fit the mesh; or a weight that the rules cannot
        shard on it; names weight, dim and sizes.
    """
    check_parts(model, partitioner)
    require_kind("tx", tx, optax.GradientTransformation, "make one with optimizer(...), or by optax")
    whole = partitioner.sharding(())

    def place(path: tuple[Any, ...], weight: Weight) -> jax.ShapeDtypeStruct:
        name = "weight " + dotted(path)
        sharding = partitioner.sharding(weight.axes, weight.shape, name)
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(place, model.weights)
    part = trained(params, model.weights)
    shapes = jax.eval_shape(tx.init, part)
    opt_state = _with_sharding(shapes, state_shardings(tx, part, trained(model.weights, model.weights)))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    model_state = _with_sharding(model.abstract_model_state(), whole)
    return TrainState(scalar, params, model_state, opt_state, scalar, scalar, _abstract_ema(part) if ema else {})


def check_parts(model: ModelDef, partitioner: Partitioner) -> None:
    """Refuse arguments of another kind, and a model that does not fit the mesh.

    Raises:
      UserError: another kind of argument; or a pipeline with another number of ranks than the mesh.
    """
    require_kind("model", model, ModelDef, "wrap the module: ModelDef(lambda rngs: MyModel(..., rngs=rngs))")
    require_kind("partitioner", partitioner, Partitioner, "make one: Partitioner(MeshSpec(...).build())")
    model.execution.check_mesh(partitioner.mesh)


def abstract_canonical(
    model: ModelDef, tx: optax.GradientTransformation, partitioner: Partitioner, *, ema: bool = False
) -> TrainState:
    """`abstract_state` as checkpoints store it: `[layers, ...]`, split over `pipe` if it divides the layers."""
    live = abstract_state(model, tx, partitioner, ema=ema)
    if model.is_canonical:
        return live
    shapes = jax.eval_shape(model.canonical, live)
    partitioner = model.execution.stored_on(partitioner)
    params = jax.tree.map(
        lambda a, w: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=partitioner.sharding(w.axes, w.shape)),
        shapes.params,
        model.canonical_weights,
    )
    opt_state = _with_sharding(shapes.opt_state, shardings_like(shapes.opt_state, params, model.canonical_weights))
    average = _abstract_ema(trained(params, model.canonical_weights)) if ema else {}
    return dataclasses.replace(live, params=params, opt_state=opt_state, ema=average)


def init_state(
    model: ModelDef, tx: optax.GradientTransformation, partitioner: Partitioner, *, seed: int = 0
) -> TrainState:
    """A fresh state, each array made in place on the devices that hold it; no full copy of a sharded weight exists.

    The values depend on the seed only, not on the mesh.
    """
    return init_function(model, tx, partitioner)(jax.random.key(seed))


def init_function(model: ModelDef, tx: optax.GradientTransformation, partitioner: Partitioner) -> Any:
    """The jitted `key -> TrainState` behind `init_state`."""

    def init(key: jax.Array) -> TrainState:
        with use(partitioner):
            params, other = model.init(key)
            zero = jnp.zeros((), jnp.int32)
            return TrainState(zero, params, other, tx.init(trained(params, model.weights)), zero, zero)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, partitioner))
    return jax.jit(init, out_shardings=shardings, compiler_options=ordered(partitioner.devices))


def _abstract_ema(part: Tree) -> Tree:
    def one(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, at_least_float32(a.dtype), sharding=a.sharding)

    return jax.tree.map(one, part)


def _with_sharding(shapes: Any, shardings: Any) -> Any:
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
