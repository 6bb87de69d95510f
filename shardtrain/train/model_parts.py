"""A model as a pipeline sees it: pure functions, of the parameters of one layer and of those that all stages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from shardtrain.nn.model import embedded, head_sums
from shardtrain.nn.remat import rematerialized
from shardtrain.pipeline.stage import ModelParts
from shardtrain.train.split_module import SplitModule, Tree
from shardtrain.weights.paths import dotted, flatten
from shardtrain.weights.trained import trained

#: Where `nn.Model` keeps the parameters of its layers.
_LAYER = ("blocks", "layer")


def model_parts(module: SplitModule, constrain: Callable[[Any], Any]) -> ModelParts:
    """Return a module that follows `nn.Model` as the functions that a pipeline runs.

    Args:
      module: the module.
      constrain: sets the sharding of the residual stream between stages.
    """
    layer = [(path[2:], variable) for path, variable in nnx.to_flat_state(module.params) if path[:2] == _LAYER]
    blocks = module.outline({}).blocks
    of_layers, of_shared = split_layers(module.canonical_weights)

    def of_layer(params: Tree) -> nnx.State:
        flat = flatten(params)
        return nnx.from_flat_state([(path, variable.replace(flat[dotted(path)])) for path, variable in layer])

    return ModelParts(
        embed=lambda shared, batch, ctx: embedded(module.outline(shared), batch, ctx),
        block=lambda params, x, ctx: blocks.apply_block(of_layer(params), x, ctx),
        head=lambda shared, x, batch, ctx: head_sums(module.outline(shared), x, batch, ctx),
        remat=lambda body: rematerialized(body, blocks.remat),
        constrain=constrain,
        trained_layer=lambda params: trained(params, of_layers),
        trained_shared=lambda shared: trained(shared, of_shared),
    )


def split_layers(params: Tree) -> tuple[Tree, Tree]:
    """Return the parameters of the layers, and all others."""
    blocks = params["blocks"]
    return blocks["layer"], {**params, "blocks": {name: tree for name, tree in blocks.items() if name != "layer"}}


def join_layers(stacked: Tree, shared: Tree) -> Tree:
    """Return the inverse of `split_layers`."""
    return {**shared, "blocks": {**shared["blocks"], "layer": stacked}}
