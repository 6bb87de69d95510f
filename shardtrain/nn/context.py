"""The inputs of a block in addition to the residual stream: the batch, its layer and its random keys."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from shardtrain.nn.cache import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """An argument of the embedder, every block and the head; a pytree.

    Attributes:
      inputs: the leaves of this microbatch, `[B, ...]` each (`positions`, `row`, `segment_ids` if rows hold several
        documents, ...).
      key: random key of this step, already folded with seed and step; `None` in evaluation.
      layer: int32 scalar, index of the layer in the whole model.
      train: whether dropout and the like are active.
      cache: what the layers of a block keep of each token; `None` except while text is generated.

    Example:
      >>> ctx = nn.Context({"row": jnp.arange(4)}, key=jax.random.key(0), train=True)
      >>> ctx.at_layer(3).row_keys("mlp").shape
      (4,)
    """

    inputs: Mapping[str, jax.Array]
    key: jax.Array | None = None
    layer: jax.Array | int = 0
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    cache: Cache | None = dataclasses.field(default=None, metadata={"static": True})

    def at_layer(self, layer: jax.Array | int) -> Context:
        """Return the same context, `layer` layers further on."""
        return dataclasses.replace(self, layer=self.layer + layer)

    def row_keys(self, site: str) -> jax.Array:
        """Return one random key per row, `[B]`, for a named place in a layer.

        It is folded from seed, step, layer, site and global row, and nothing else, so the bits do not depend on mesh,
        accumulation or pipeline.
        """
        assert self.key is not None, "random bits need a key: Context(train=True) must have one"
        key = jax.random.fold_in(self.key, jnp.asarray(self.layer, jnp.int32))
        key = jax.random.fold_in(key, zlib.crc32(site.encode()))
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(self.inputs["row"])
