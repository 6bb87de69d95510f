"""The state of a training run, from a model's declarations to sharded arrays."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.nn.param import Weight, describe
from shardtrain.optim import state_shardings
from shardtrain.sharding import Partitioner, use

Tree = dict[str, Any]  # nested dicts with str keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; a pytree.

    Attributes:
      step: int32 scalar, updates tried so far.
      params: the model's weights, nested dicts.
      model_state: what else the forward pass changes (BatchNorm statistics, ...); usually empty.
      opt_state: the optimizer's own state.
      skipped: int32 scalar, updates skipped because loss or gradient was not finite.
      skipped_in_row: the same, since the last applied update.
    """

    step: jax.Array
    params: Tree
    model_state: Tree
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_row: jax.Array


class ModelDef:
    """A Flax NNX module taken apart: its static graph, and what is known of its variables before any array exists.

    Args:
      make: builds the module from `nnx.Rngs`. Called abstractly here, and again inside jit by `init`.
      replicate_unannotated: accept weights without logical axes, whole on every device. By default a module opts in
        with an attribute of that name.

    Raises:
      UserError: weights without logical axes in a module that did not opt in; names them.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], *, replicate_unannotated: bool | None = None):
        with nnx.use_eager_sharding(False):
            module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self.make = make
        self.graph, self._params, self._rngs, self._other = _split(module)
        self.weights: Tree = _nested(self._params, describe)
        if replicate_unannotated is None:
            replicate_unannotated = getattr(module, "replicate_unannotated", False)
        bare = [path for path, weight in flatten(self.weights).items() if not weight.annotated]
        if bare and not replicate_unannotated:
            raise UserError(
                f"{type(module).__name__} has {len(bare)} weights without logical axes ({', '.join(bare[:4])}"
                f"{', ...' if len(bare) > 4 else ''}), so they could not be sharded; declare them with nn.param or "
                "nnx.with_partitioning, or set replicate_unannotated = True on the model to keep them whole everywhere"
            )

    @property
    def mutable(self) -> list[str]:
        """Paths of what the forward pass may change, parameters and random state aside."""
        return [dotted(path) for path, _ in nnx.to_flat_state(self._other)]

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Parameters and other state, drawn from `key`; a pure function, to be jitted with output shardings."""
        with nnx.use_eager_sharding(False):
            _, params, _, other = _split(self.make(nnx.Rngs(key)))
        return _nested(params, lambda v: v[...]), _nested(other, lambda v: v[...])

    def merge(self, params: Tree, model_state: Tree, key: jax.Array | None = None) -> nnx.Module:
        """The module with these values; its own random streams, if it has any, are seeded from `key`."""
        rngs = []
        for path, variable in nnx.to_flat_state(self._rngs):
            value = jnp.zeros((), variable.dtype)
            if issubclass(variable.type, nnx.RngKey):
                stream = zlib.crc32(dotted(path[:-1]).encode())
                value = jax.random.fold_in(jax.random.key(0) if key is None else key, stream)
            rngs.append((path, variable.replace(value)))
        with nnx.use_eager_sharding(False):
            return nnx.merge(
                self.graph,
                _filled(self._params, params),
                nnx.from_flat_state(rngs),
                _filled(self._other, model_state),
            )

    def model_state(self, module: nnx.Module) -> Tree:
        """What the forward pass left in a module that `merge` made."""
        return _nested(_split(module)[-1], lambda v: v[...])


def abstract_state(model: ModelDef, tx: optax.GradientTransformation, partitioner: Partitioner) -> TrainState:
    """The state as `ShapeDtypeStruct`s that carry their shardings: what `init_state` makes.

    Raises:
      UserError: a weight that the rules cannot lay out on the mesh; names weight, dim and sizes.
    """
    whole = partitioner.sharding(())

    def place(path: tuple[Any, ...], weight: Weight) -> jax.ShapeDtypeStruct:
        name = "weight " + dotted(entry.key for entry in path)
        sharding = partitioner.sharding(weight.axes, weight.shape, name)
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(place, model.weights)
    _, other = jax.eval_shape(model.init, jax.random.key(0))
    shapes = jax.eval_shape(tx.init, params)
    opt_state = _with_sharding(shapes, state_shardings(tx, params, model.weights))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(scalar, params, _with_sharding(other, whole), opt_state, scalar, scalar)


def init_state(
    model: ModelDef, tx: optax.GradientTransformation, partitioner: Partitioner, *, seed: int = 0
) -> TrainState:
    """A fresh state, each array made in place on the devices that keep it; no full copy of a sharded weight exists.

    The values depend on the seed only, not on the mesh.
    """
    return init_function(model, tx, partitioner)(jax.random.key(seed))


def init_function(model: ModelDef, tx: optax.GradientTransformation, partitioner: Partitioner) -> Any:
    """The jitted `key -> TrainState` behind `init_state`."""

    def init(key: jax.Array) -> TrainState:
        with use(partitioner):
            params, other = model.init(key)
            zero = jnp.zeros((), jnp.int32)
            return TrainState(zero, params, other, tx.init(params), zero, zero)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, partitioner))
    return jax.jit(init, out_shardings=shardings)


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts as one dict from dotted path to leaf, in key order."""
    return {dotted(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def dotted(keys: Any) -> str:
    """Keys joined to a dotted path."""
    return ".".join(map(str, keys))


def _split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """Static graph, parameters, random state, everything else."""
    graph, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
    params, rngs, other = states
    return graph, params, rngs, other


def _nested(state: nnx.State, leaf: Callable[[nnx.Variable], Any]) -> Tree:
    tree: Tree = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, last = map(str, path)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf(variable)
    return tree


def _filled(state: nnx.State, values: Tree) -> nnx.State:
    flat = flatten(values)
    return nnx.from_flat_state([(p, v.replace(flat[dotted(p)])) for p, v in nnx.to_flat_state(state)])


def _with_sharding(shapes: Any, shardings: Any) -> Any:
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
