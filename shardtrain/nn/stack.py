"""A stack of equal blocks: one declaration, a leading `layers` dim, one scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.host.typed import typed
from shardtrain.nn.cache import Cache, Kept
from shardtrain.nn.context import Context
from shardtrain.nn.param import describe, stacked
from shardtrain.nn.remat import Remat, remat_policy, rematerialized
from shardtrain.nn.returned import checked_block, refuse_bare_arrays, refuse_sown
from shardtrain.sharding import constrain
from shardtrain.weights.weight import Weight

Aux = dict[str, tuple[jax.Array, jax.Array]]


def constrain_residual(x: Any, inputs: Mapping[str, jax.Array]) -> Any:
    """Constrain the layout of the residual stream, a pytree of `[B, ...]` arrays, between blocks and stages.

    Rows are split like the rows of a batch, and the second dim like a sequence between blocks (`seq_residual`), if it
    is as long as the tokens in `inputs`.
    """
    length = inputs["tokens"].shape[1] if "tokens" in inputs else None

    def one(a: jax.Array) -> jax.Array:
        seq = "seq_residual" if a.ndim > 2 and a.shape[1] == length else None
        return constrain(a, *("batch", seq, *[None] * a.ndim)[: a.ndim])

    return jax.tree.map(one, x)


class Stack(nnx.Module):
    """`n_layers` blocks of one kind, `block(x, ctx) -> (x, aux)`, applied one after the other.

    Each weight of a block gains a leading `layers` dim. `x`, the residual stream, is any pytree with the same structure
    in and out; the stack constrains its layout between blocks. `aux` is a dict of `(sum, weight)` pairs, added up
    over the layers. Blocks hold parameters only, and no state that changes in the forward pass.

    Args:
      make_block: builds one block from its `nnx.Rngs`.
      n_layers: number of blocks, 1 or more.
      remat: what is kept for the backward pass: `full` keeps only the input of each block, `none` everything; see
        `remat_policy` in `nn/remat.py`.
      scan: use one `lax.scan`, which compiles in a time independent of depth, instead of an unrolled loop.
      rngs: seeds of the weights.

    Raises:
      UserError: there are no layers, the remat word is unknown, or a block has mutable state or a bare array.

    Example:
      >>> class Block(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.mlp = nn.GatedMLP(4, 8, rngs=rngs)
      ...     def __call__(self, x, ctx):
      ...         return x + self.mlp(x, ctx), {}
      >>> blocks = nn.Stack(Block, 3, rngs=nnx.Rngs(0))
      >>> x, aux = blocks(jnp.ones((2, 5, 4)), nn.Context({}))
      >>> x.shape, blocks.layer.mlp.up.weight.shape
      ((2, 5, 4), (3, 4, 8))
    """

    @typed
    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        n_layers: int,
        *,
        remat: Remat = "full",
        scan: bool = True,
        rngs: nnx.Rngs,
    ):
        if n_layers < 1:
            raise UserError(f"a stack has {n_layers} layers; use 1 or more")
        remat_policy(remat)
        self.n_layers, self.remat, self.scan = n_layers, remat if isinstance(remat, str) else tuple(remat), scan
        graph: Any = None
        one: dict[Any, Weight] = {}

        def build(key: jax.Array) -> Any:
            nonlocal graph
            block = make_block(nnx.Rngs(key))
            refuse_bare_arrays(block)
            graph, state = nnx.split(block)
            for path, variable in nnx.to_flat_state(state):
                if not isinstance(variable, nnx.Param):
                    raise UserError(
                        f"a block of the stack holds {'.'.join(map(str, path))}, a {type(variable).__name__}: blocks "
                        "hold parameters only; take random bits from ctx.row_keys, as nn.Dropout does, or keep such a "
                        "layer outside the stack"
                    )
                one[path] = describe(variable)  # at this point it still has the shape of one layer
            return state

        many = jax.vmap(build)(jax.random.split(rngs.params(), n_layers))
        self.layer = nnx.merge(
            graph, nnx.from_flat_state([(p, stacked(v, one[p])) for p, v in nnx.to_flat_state(many)])
        )

    def apply_block(self, params: Any, x: Any, ctx: Context) -> tuple[Any, Aux]:
        """Apply one block as a pure function of its parameters (`params()` without the `layers` dim).

        Raises:
          UserError: the block does not return `(x, aux)`.
        """
        block = nnx.merge(nnx.graphdef(self.layer), params)
        returned = block(x, ctx)
        refuse_sown(block)
        y, aux = checked_block(type(block).__name__, x, returned)
        return constrain_residual(y, ctx.inputs), aux

    def extend(self, x: Any, ctx: Context, past: Any) -> tuple[Any, tuple[Kept, ...]]:
        """Apply all layers to new tokens of a text; returns the final `x` and what the layers keep of these tokens.

        Args:
          x: the embedded tokens.
          ctx: their context.
          past: what the layers kept of the tokens before, with a leading `layers` dim; `None` at the start of a text.
        """

        def body(x: Any, layer: tuple[Any, jax.Array, Any]) -> tuple[Any, tuple[Kept, ...]]:
            params, index, past = layer
            cache = Cache(past)
            x, _ = self.apply_block(params, x, dataclasses.replace(ctx.at_layer(index), cache=cache))
            return x, tuple(cache.kept)

        layers = (self.params(), jnp.arange(self.n_layers, dtype=jnp.int32), past)
        return jax.lax.scan(body, constrain_residual(x, ctx.inputs), layers)

    def params(self) -> Any:
        """Return the parameters of all layers, `[layers, ...]` each."""
        return nnx.state(self.layer)

    def __call__(self, x: Any, ctx: Context) -> tuple[Any, Aux]:
        """Apply all layers in order; returns the final `x` and the summed `aux`."""

        def body(x: Any, layer: tuple[Any, jax.Array]) -> tuple[Any, Aux]:
            params, index = layer
            return self.apply_block(params, x, ctx.at_layer(index))

        x, body = constrain_residual(x, ctx.inputs), rematerialized(body, self.remat, in_scan=self.scan)
        layers = (self.params(), jnp.arange(self.n_layers, dtype=jnp.int32))
        if self.scan:
            x, aux = jax.lax.scan(body, x, layers)
            return x, jax.tree.map(lambda a: a.sum(0), aux)
        total: Aux | None = None
        for i in range(self.n_layers):
            x, aux = body(x, jax.tree.map(lambda a, i=i: a[i], layers))
            total = aux if total is None else jax.tree.map(jnp.add, total, aux)
        assert total is not None
        return x, total
