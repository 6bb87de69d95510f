"""A Flax NNX module taken apart: what is static, what is trained, how it is initialised, merged and cut."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shardtrain.errors import UserError, did_you_mean, require_kind
from shardtrain.nn.context import Context
from shardtrain.nn.model import embedded, head_sums
from shardtrain.nn.param import describe
from shardtrain.nn.remat import rematerialized
from shardtrain.nn.returned import built
from shardtrain.nn.stack import Stack
from shardtrain.pipeline.idle import Idle
from shardtrain.pipeline.layers import layer_table
from shardtrain.pipeline.phases import BackwardName, check_backward
from shardtrain.pipeline.schedules import Program, Schedule, allocate, check_trains
from shardtrain.pipeline.stage import Cut
from shardtrain.weights.layout import Layout
from shardtrain.weights.paths import dotted, flatten

Tree = dict[str, Any]  # nested dicts with str keys

#: Where `nn.Model` keeps the parameters of its layers.
_LAYER = ("blocks", "layer")


class ModelDef:
    """A Flax NNX module taken apart: its static graph, and what is known of its variables before any array exists.

    Args:
      make: builds the module from `nnx.Rngs`. Called abstractly here, and again inside jit by `init`.
      schedule: of a pipeline over the mesh axis `pipe`; the weights of `blocks` then live as `[chunks, pipe, k, ...]`.
      backward: of a schedule without W, whether the backward pass of a stage recomputes it (`remat`) or keeps all that
        it needs (`save`), as far as the layers' own remat policy lets it.
      idle: of a schedule, whether idle ranks compute on values that nobody reads, or `skip` their work, as well as
        embedding and head on all but the end stages. See `shardtrain.pipeline.idle` for when that is refused.
      packed: whether rows may hold several segments; see `shardtrain.data.Source`.
      replicate_unannotated: accept weights without logical axes, whole on every device. By default a module opts in
        with an attribute of that name.

    Raises:
      UserError: a `make` that builds no module from `nnx.Rngs`, or one that keeps bare arrays; weights without logical
        axes in a module that did not opt in, or with those of a mesh; names them. Under a schedule, a module that does
        not follow `nn.Model`, whose forward pass changes state, or with fewer layers than stages; or a `backward` that
        the schedule does not have.
    """

    program: Program | None = None
    layers_CRk: np.ndarray | None = None  # noqa: N815

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        *,
        schedule: Schedule | None = None,
        backward: BackwardName = "remat",
        idle: Idle = "compute",
        packed: bool = True,
        replicate_unannotated: bool | None = None,
    ):
        module = built(make)
        self.make, self.idle, self.packed = make, idle, packed
        self.graph, self._params, self._rngs, self._other = _split(module)
        self.canonical_weights: Tree = _nested(self._params, describe)
        _refuse_mesh_axes(self.canonical_weights)
        if idle not in get_args(Idle):
            raise UserError(f"idle {idle!r} does not exist (pipeline.idle); {did_you_mean(idle, get_args(Idle))}")
        self.weights = self.canonical_weights
        if schedule is not None:
            require_kind("schedule", schedule, Schedule, "make one with schedules.make('1f1b', ranks, microbatches)")
            check_backward(schedule, backward)
            self._lay_out(schedule, module)
            self.program = allocate(schedule, save_residuals=backward == "save")
        if replicate_unannotated is None:
            replicate_unannotated = getattr(module, "replicate_unannotated", False)
        bare = [path for path, weight in flatten(self.weights).items() if not weight.annotated]
        if bare and not replicate_unannotated:
            raise UserError(
                f"{type(module).__name__} has {len(bare)} weights without logical axes ({', '.join(bare[:4])}"
                f"{', ...' if len(bare) > 4 else ''}), so they could not be sharded; declare them with nn.param or "
                "nnx.with_partitioning, or set replicate_unannotated = True on the model to keep them whole everywhere"
            )

    def _lay_out(self, schedule: Schedule, module: Any) -> None:
        changing = [dotted(path) for part in (self._rngs, self._other) for path, _ in nnx.to_flat_state(part)]
        if changing or not isinstance(getattr(module, "blocks", None), Stack):
            reason = (
                f"the forward pass changes {', '.join(changing[:3])}" if changing else "it has no Stack named blocks"
            )
            raise UserError(
                f"{type(module).__name__} cannot be pipelined: {reason}; set mesh.pipe to 1, or write the model as "
                "shardtrain.nn.Model describes"
            )
        check_trains(schedule)
        layers = module.blocks.n_layers
        self.layers_CRk = layer_table(schedule, layers)
        slots = [int(np.flatnonzero(self.layers_CRk.ravel() == layer)[0]) for layer in range(layers)]
        self.layout = Layout(layers, self.layers_CRk.shape, tuple(slots))
        self.weights = self.layout.live_weights(self.canonical_weights)

    def canonical(self, tree: Any) -> Any:
        """A state tree with `[layers, ...]` leaves, as checkpoints store it."""
        return tree if self.program is None else self.layout.unpack(tree, self.canonical_weights)

    def live(self, tree: Any) -> Any:
        """The inverse of `canonical`."""
        return tree if self.program is None else self.layout.pack(tree, self.canonical_weights)

    def context(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None, *, train: bool = False) -> Context:
        """What the module's parts are told of a batch."""
        return Context(inputs=batch, key=key, train=train, packed=self.packed)

    def cut(self, pin: Callable[[Any], Any]) -> Cut:
        """The module as the pure functions that a pipeline runs."""
        layer = [(path, variable) for path, variable in nnx.to_flat_state(self._params) if path[:2] == _LAYER]
        blocks = self.outline({}).blocks

        def of_layer(params: Tree) -> nnx.State:
            flat = flatten(params)
            return nnx.from_flat_state([(path[2:], v.replace(flat[dotted(path[2:])])) for path, v in layer])

        return Cut(
            embed=lambda shared, batch, ctx: embedded(self.outline(shared), batch, ctx),
            block=lambda params, x, ctx: blocks.apply_block(of_layer(params), x, ctx),
            head=lambda shared, x, batch, ctx: head_sums(self.outline(shared), x, batch, ctx),
            remat=lambda body: rematerialized(body, blocks.remat),
            pin=pin,
        )

    def outline(self, shared: Tree) -> Any:
        """The module with the parameters in `shared`, and shapes for all others."""
        flat = flatten(shared)
        weights = nnx.to_flat_state(self._params)
        filled = [(path, v.replace(flat[dotted(path)]) if dotted(path) in flat else v) for path, v in weights]
        with nnx.use_eager_sharding(False):
            return nnx.merge(self.graph, nnx.from_flat_state(filled), self._rngs, self._other)

    @property
    def mutable(self) -> list[str]:
        """Paths of what the forward pass may change, parameters and random state aside."""
        return [dotted(path) for path, _ in nnx.to_flat_state(self._other)]

    def abstract_model_state(self) -> Tree:
        """Shapes and dtypes of what `init` returns beside the parameters."""
        return _nested(self._other, lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Parameters and other state, drawn from `key`; a pure function, to be jitted with output shardings."""
        with nnx.use_eager_sharding(False):
            _, params, _, other = _split(self.make(nnx.Rngs(key)))
        return self.live(_nested(params, lambda v: v[...])), _nested(other, lambda v: v[...])

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
                _filled(self._params, self.canonical(params)),
                nnx.from_flat_state(rngs),
                _filled(self._other, model_state),
            )

    def model_state(self, module: nnx.Module) -> Tree:
        """What the forward pass left in a module that `merge` made."""
        return _nested(_split(module)[-1], lambda v: v[...])


def split_layers(params: Tree) -> tuple[Tree, Tree]:
    """The parameters of the layers, and all others."""
    blocks = params["blocks"]
    return blocks["layer"], {**params, "blocks": {name: tree for name, tree in blocks.items() if name != "layer"}}


def join_layers(stacked: Tree, shared: Tree) -> Tree:
    """The inverse of `split_layers`."""
    return {**shared, "blocks": {**shared["blocks"], "layer": stacked}}


def _refuse_mesh_axes(weights: Tree) -> None:
    for path, weight in flatten(weights).items():
        for axis in weight.axes:
            if not isinstance(axis, str | None):
                raise UserError(
                    f"weight {path} has {axis!r} among its axes {weight.axes}: so mesh axes are written, but a weight "
                    "names one logical axis per dim, such as embed, mlp, heads or vocab, or None; rules map them to "
                    "mesh axes"
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
