"""What layers keep of earlier tokens while text is generated, so that each new token passes through the model alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from shardtrain.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """Arrays of one layer with a value for each token, such as keys and values; a pytree.

    Attributes:
      arrays: `[B, tokens, ...]` each; a stack of layers adds dims in front.
      axes: the logical axes of the dims after the tokens.
    """

    arrays: tuple[jax.Array, ...]
    axes: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})


class Cache:
    """The tokens before the present ones, as the layers of one block see them; it collects what they keep of these.

    It is in the context of a block while text is generated. A layer that looks at other tokens (`nn.Attention`) calls
    `extend` once in each forward pass. Layers of a block are told apart by the order of their calls.

    Args:
      past: what the layers of the block kept, `[B, slots, ...]` each: the token at position `p` is in slot `p`. Slots
        from the first of the present positions on are to be ignored. `None` at the start of a text.

    Attributes:
      kept: of the present tokens, one entry per call of `extend`.

    Example:
      >>> cache = nn.Cache(None)
      >>> cache.extend(jnp.ones((1, 5, 2, 4)), axes=("kv_heads", None)) is None
      True
      >>> cache.kept[0].arrays[0].shape
      (1, 5, 2, 4)
    """

    def __init__(self, past: Sequence[Kept] | None):
        self._past, self.kept = past, list[Kept]()

    def extend(self, *arrays: jax.Array, axes: tuple[str | None, ...]) -> tuple[jax.Array, ...] | None:
        """Keep arrays of the present tokens, `[B, tokens, ...]` each; return those of the past, `[B, slots, ...]`.

        Args:
          *arrays: of one layer.
          axes: the logical axes of their dims after the tokens.
        """
        self.kept.append(Kept(arrays, axes))
        return None if self._past is None else self._past[len(self.kept) - 1].arrays


def constrain_kept(kept: Any, lead: Sequence[str | None], tokens: str) -> Any:
    """Constrain the layout of a pytree of `Kept`.

    Args:
      kept: of a stack of layers.
      lead: the logical axes of the dims before the batch.
      tokens: the logical axis of the dim of tokens.
    """

    def one(entry: Kept) -> Kept:
        arrays = (constrain(a, *lead, "batch", tokens, *entry.axes, name="the cache") for a in entry.arrays)
        return dataclasses.replace(entry, arrays=tuple(arrays))

    return jax.tree.map(one, kept, is_leaf=lambda entry: isinstance(entry, Kept))
