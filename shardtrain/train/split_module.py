"""A Flax NNX module split into what is static, what is trained and what else changes, before any array exists."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.nn.context import Context
from shardtrain.nn.param import describe
from shardtrain.nn.returned import built
from shardtrain.weights.paths import dotted, flatten
from shardtrain.weights.trained import ALL, marked
from shardtrain.weights.weight import Weight

Tree = dict[str, Any]  # nested dicts with str keys


class SplitModule:
    """A Flax NNX module split into its static graph and its variables, as shapes.

    Args:
      make: builds the module from `nnx.Rngs`. Called abstractly here, and again inside jit by `draw`.
      replicate_unannotated: see `ModelDef`.
      trains: patterns of the weights that may train, see `weights.trained.marked`.
      freeze: patterns of the weights that do not.

    Attributes:
      params: the parameters, as shapes.
      canonical_weights: a `Weight` per parameter, with the layers of a `Stack` as `[layers, ...]`.

    Raises:
      UserError: as `ModelDef` without a schedule.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        *,
        replicate_unannotated: bool | None = None,
        trains: Sequence[str] = ALL,
        freeze: Sequence[str] = (),
    ):
        module = built(make)
        self.make = make
        self.graph, self.params, self._rngs, self._other = _split(module)
        self.canonical_weights: Tree = _rates_by_width(_nested(self.params, describe), module)
        _refuse_mesh_axes(self.canonical_weights)
        if replicate_unannotated is None:
            replicate_unannotated = getattr(module, "replicate_unannotated", False)
        bare = [path for path, weight in flatten(self.canonical_weights).items() if not weight.annotated]
        if bare and not replicate_unannotated:
            raise UserError(
                f"{type(module).__name__} has {len(bare)} weights without logical axes ({', '.join(bare[:4])}"
                f"{', ...' if len(bare) > 4 else ''}), so they could not be sharded; declare them with nn.param or "
                "nnx.with_partitioning, or set replicate_unannotated = True on the model to keep them whole everywhere"
            )
        self.canonical_weights = marked(self.canonical_weights, trains, freeze)

    def context(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None, *, train: bool = False) -> Context:
        """The context of a batch, which all parts of the module receive."""
        return Context(inputs=batch, key=key, train=train)

    def outline(self, shared: Tree) -> Any:
        """The module with the parameters in `shared`, and shapes for all others."""
        flat = flatten(shared)
        weights = nnx.to_flat_state(self.params)
        filled = [(path, v.replace(flat[dotted(path)]) if dotted(path) in flat else v) for path, v in weights]
        with nnx.use_eager_sharding(False):
            return nnx.merge(self.graph, nnx.from_flat_state(filled), self._rngs, self._other)

    @property
    def mutable(self) -> list[str]:
        """Paths of the variables that the forward pass may change, other than parameters and random state."""
        return [dotted(path) for path, _ in nnx.to_flat_state(self._other)]

    @property
    def random(self) -> list[str]:
        """Paths of the module's own random state."""
        return [dotted(path) for path, _ in nnx.to_flat_state(self._rngs)]

    def abstract_model_state(self) -> Tree:
        """Shapes and dtypes of the variables in `mutable`."""
        return _nested(self._other, lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype))

    def draw(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Canonical parameters and the variables in `mutable`, drawn from `key`; a pure function."""
        with nnx.use_eager_sharding(False):
            _, params, _, other = _split(self.make(nnx.Rngs(key)))
        return _nested(params, lambda v: v[...]), _nested(other, lambda v: v[...])

    def merge(self, params: Tree, model_state: Tree, key: jax.Array | None = None) -> nnx.Module:
        """The module with these canonical parameters; its own random streams, if it has any, are seeded from `key`."""
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
                _filled(self.params, params),
                nnx.from_flat_state(rngs),
                _filled(self._other, model_state),
            )

    def model_state(self, module: nnx.Module) -> Tree:
        """The variables in `mutable` after the forward pass of a module that `merge` made."""
        return _nested(_split(module)[-1], lambda v: v[...])


def _rates_by_width(weights: Tree, module: nnx.Module) -> Tree:
    """The weights with the learning rates of a mu-parametrised module, see `width_multiplier` of `nn.Model`."""
    multiplier = getattr(module, "width_multiplier", 1.0)

    def one(weight: Weight) -> Weight:
        return dataclasses.replace(weight, lr_scale=1 / multiplier) if weight.role in ("matrix", "router") else weight

    return weights if multiplier == 1 else jax.tree.map(one, weights)


def _refuse_mesh_axes(weights: Tree) -> None:
    for path, weight in flatten(weights).items():
        for axis in weight.axes:
            if not isinstance(axis, str | None):
                raise UserError(
                    f"weight {path} has {axis!r} among its axes {weight.axes}: this is how mesh axes are written, but "
                    "a weight names one logical axis per dim, such as embed, mlp, heads or vocab, or None; rules map "
                    "them to mesh axes"
                )


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
