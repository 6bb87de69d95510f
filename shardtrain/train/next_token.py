"""The two programs of generation: reading a text from its start, and one more token with a cache of those before it.

Shapes: B rows, S tokens, T slots of the cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.launch.cpu_collectives import ordered
from shardtrain.nn.cache import constrain_kept
from shardtrain.nn.context import Context
from shardtrain.nn.model import Batch
from shardtrain.sharding import Partitioner, use
from shardtrain.train.model_def import ModelDef
from shardtrain.train.split_module import Tree
from shardtrain.weights.precision import at_least_float32

#: `(module, batch, ctx) -> logits [B, S, V]`, for a module that does not follow `nn.Model`.
LogitsFunction = Callable[[Any, Batch, Context], jax.Array]


class NextToken:
    """The logits of the token that follows a text, by jitted functions that compile once for each shape.

    Texts are padded on the right, so that a token of position `p` is in slot `p`. Causal models do not see the padding.

    Args:
      model: a definition whose module follows `nn.Model` and has `logits(x)`; any other with `logits`.
      partitioner: the mesh and its rules.
      logits: of a module that does not follow `nn.Model`; then nothing is kept.
    """

    def __init__(self, model: ModelDef, partitioner: Partitioner, logits: LogitsFunction | None = None):
        self._model, self._place, self._logits = model, partitioner, logits
        # One token has no sequence to split; those before it stay split as the sequence was.
        rules = {**partitioner.rules, "seq": (), "seq_residual": (), "past": partitioner.rules["seq"]}
        self._one = dataclasses.replace(partitioner, rules=rules)
        whole = partitioner.sharding(())
        options: dict[str, Any] = {"out_shardings": (whole, None), "compiler_options": ordered(partitioner.devices)}
        self.read = jax.jit(self._read, static_argnames="keep", **options)
        self.grow = jax.jit(self._grow, static_argnames="slots", compiler_options=ordered(partitioner.devices))
        self.step = jax.jit(self._step, donate_argnames="cache", **options)

    def _read(
        self, params: Tree, model_state: Tree, text_BS: jax.Array, lengths_B: jax.Array, keep: bool
    ) -> tuple[jax.Array, Tree]:
        """Logits `[B, V]` of the token after each text of `lengths_B` tokens, and if `keep`, a cache of `S` slots."""
        with use(self._place):
            positions_BS = jnp.broadcast_to(jnp.arange(text_BS.shape[1], dtype=jnp.int32), text_BS.shape)
            last_BS = positions_BS == lengths_B[:, None] - 1
            logits_BV, kept = self._extend(params, model_state, text_BS, positions_BS, last_BS, None, self._place)
        return logits_BV, self._placed(kept) if keep else {}

    def _grow(self, cache: Tree, slots: int) -> Tree:
        """The same cache with `slots` slots."""

        def padded(a: jax.Array) -> jax.Array:
            dim = self._tokens_dim
            return jnp.pad(a, [(0, slots - a.shape[dim] if i == dim else 0) for i in range(a.ndim)])

        return self._placed(jax.tree.map(padded, cache))

    def _step(
        self, params: Tree, model_state: Tree, cache: Tree, tokens_B: jax.Array, positions_B: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """Logits `[B, V]` of the token after `tokens_B` at `positions_B`, and the cache with these tokens."""
        with use(self._one):
            last_B1 = jnp.ones((len(tokens_B), 1), bool)
            logits_BV, kept = self._extend(
                params, model_state, tokens_B[:, None], positions_B[:, None], last_B1, cache, self._one
            )

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            dim = self._tokens_dim
            here_BT = jnp.arange(old.shape[dim]) == positions_B[:, None]
            return jnp.where(here_BT.reshape(*here_BT.shape, *[1] * (old.ndim - dim - 1)), new, old)

        return logits_BV, self._placed(jax.tree.map(write, cache, kept))

    @property
    def _tokens_dim(self) -> int:
        return len(self._model.execution.kept_axes) + 1

    def _placed(self, cache: Tree) -> Tree:
        with use(self._one):
            return constrain_kept(cache, self._model.execution.kept_axes, "past")

    def _extend(
        self,
        params: Tree,
        model_state: Tree,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        last_BS: jax.Array,
        past: Tree | None,
        place: Partitioner,
    ) -> tuple[jax.Array, Tree]:
        batch = {
            "tokens": place.constrain(tokens_BS, "batch", "seq"),
            "positions": place.constrain(positions_BS, "batch", "seq"),
            "loss_mask": place.constrain(last_BS.astype(jnp.float32), "batch", "seq"),
            "row": jnp.arange(len(tokens_BS), dtype=jnp.int32),
        }

        def next_BV(module: Any, x: Any, batch: Batch) -> jax.Array:
            last = at_mask(x, batch["loss_mask"])
            with use(self._one):
                return _wide(module.logits(last)[:, 0])

        if self._logits is None:
            return self._model.execution.extend(params, model_state, batch, past, place, next_BV)
        module = self._model.merge(params, model_state)
        module.eval()
        logits_BSV = self._logits(module, batch, self._model.context(batch))
        return _wide(at_mask(logits_BSV, batch["loss_mask"])[:, 0]), {}


def at_mask(x: Any, mask_BS: jax.Array) -> Any:
    """The one position of each row where the mask is not 0, `[B, 1, ...]`, in all leaves `[B, S, ...]` of a pytree.

    By a sum, so that a sequence that is split over devices stays so.
    """

    def one(a: jax.Array) -> jax.Array:
        if a.ndim < 3 or a.shape[1] != mask_BS.shape[1]:
            return a
        here = mask_BS.reshape(*mask_BS.shape, *[1] * (a.ndim - 2)) != 0
        return jax.lax.reduce_sum(jnp.where(here, a, 0), (1,))[:, None]

    return jax.tree.map(one, x)


def _wide(logits: jax.Array) -> jax.Array:
    return logits.astype(at_least_float32(logits.dtype))
