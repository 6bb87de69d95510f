"""What a block may know about where and when it runs."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Passed to the embedder, to every block and to the head; a pytree.

    Attributes:
      inputs: the batch leaves of this microbatch, `[B, ...]` each (`positions`, `segment_ids`, `row`, ...).
      key: random key of this step, already folded with seed and step; `None` in evaluation.
      layer: int32 scalar, index of the layer in the whole model.
      train: whether dropout and the like are active.
    """

    inputs: Mapping[str, jax.Array]
    key: jax.Array | None = None
    layer: jax.Array | int = 0
    train: bool = dataclasses.field(default=False, metadata={"static": True})

    def at_layer(self, layer: jax.Array | int) -> Context:
        """The same context, `layer` layers further on."""
        return dataclasses.replace(self, layer=self.layer + layer)

    def row_keys(self, site: str) -> jax.Array:
        """One random key per row, `[B]`, for a named place in a layer.

        Folded from (seed, step, layer, site, global row) and nothing else, so that the bits depend neither on the
        mesh nor on accumulation nor on the pipeline.
        """
        assert self.key is not None, "random bits asked for without a key: Context(train=True) needs one"
        key = jax.random.fold_in(self.key, jnp.asarray(self.layer, jnp.int32))
        key = jax.random.fold_in(key, zlib.crc32(site.encode()))
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(self.inputs["row"])
