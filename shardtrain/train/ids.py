"""A check of the ids in a batch against the tables of the model, on the host before the step.

A gather clamps an id that is out of range, or returns zeros, and training goes on silently. The check is not part of
the jitted step, so it works with any mesh and pipeline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from shardtrain.errors import UserError
from shardtrain.nn.model import Batch
from shardtrain.train.model_def import ModelDef
from shardtrain.weights.paths import flatten


@dataclasses.dataclass(frozen=True)
class _Table:
    """The table that the ids of a leaf index."""

    name: str
    size: int
    negative: str | None = None  # the meaning of a negative id, if it has one


class IdCheck:
    """Refuses a batch whose ids are out of range, by the shapes of the model's weights.

    `tokens` are compared with the dim `vocab` of embeddings, `targets` with that of the head (or of the embedding that
    serves as one), `positions` with the dim `positions` of position tables. Other leaves are not checked, nor are
    tables whose weights do not carry these axes: a gather of the model's own (`jnp.take`) is not seen.

    Args:
      model: its weights give the numbers of ids.

    Raises:
      UserError: no weight has a dim `vocab` or `positions`, so that there is nothing to compare ids with.
    """

    def __init__(self, model: ModelDef):
        self._tables = _tables(model)
        if not self._tables:
            raise UserError(
                "debug compares ids with weights of a logical axis 'vocab' or 'positions', and this model has none; "
                "declare the table's axes, as nn.Embedding does, or drop debug"
            )

    def __call__(self, batch: Batch) -> None:
        """Check the rows of a global batch that this process holds; waits for them.

        Raises:
          UserError: an id out of range; names the leaf, the id, its position and the rule. Or the values are unknown.
        """
        for name, table in self._tables.items():
            for offset, ids in _parts(name, batch.get(name)):
                low = 0 if table.negative is None else np.iinfo(ids.dtype).min
                outside = np.argwhere((ids < low) | (ids >= table.size))
                if len(outside):
                    row, *rest = (int(i) + o for i, o in zip(outside[0], offset, strict=True))
                    also = "" if table.negative is None else f", or negative for {table.negative}"
                    raise UserError(
                        f"batch[{name!r}] holds {ids[tuple(outside[0])]} in row {row}, at {', '.join(map(str, rest))}, "
                        f"but {table.name} has {table.size}: ids are 0 to {table.size - 1}{also}; correct the data, or "
                        "make the model's table larger"
                    )


def _parts(name: str, leaf: Any) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Each part of an array that this process holds, once, and the index at which it begins."""
    if leaf is None:
        return
    if isinstance(leaf, jax.core.Tracer):
        raise UserError(
            f"debug reads the values of batch[{name!r}], which are not known within another jax.jit; call the step "
            "outside of it, or drop debug"
        )
    if not isinstance(leaf, jax.Array):
        yield (0,) * np.ndim(leaf), np.asarray(leaf)
        return
    found = {tuple(part.start or 0 for part in shard.index): shard.data for shard in leaf.addressable_shards}
    for offset, data in found.items():
        yield offset, np.asarray(data)


def _tables(model: ModelDef) -> Mapping[str, _Table]:
    weights = flatten(model.canonical_weights).values()

    def sizes(axis: str, role: str | None = None) -> list[int]:
        return [w.shape[w.axes.index(axis)] for w in weights if axis in w.axes and role in (None, w.role)]

    tables: dict[str, _Table] = {}
    if every := sizes("vocab"):  # if a role has several, which one is used is not known here
        inputs = sizes("vocab", "embedding") or every
        tables["tokens"] = _Table("the model's vocabulary", max(inputs))
        outputs = max(sizes("vocab", "head") or inputs)
        tables["targets"] = _Table("the model's vocabulary", outputs, "a target that is ignored")
    if positions := sizes("positions"):
        tables["positions"] = _Table("the model's position table", min(positions))
    return tables
