"""Microbatches: of M of them, microbatch m is the rows `m::M` of a batch, so that no row moves to another device."""

from __future__ import annotations

from typing import Any

import jax

from shardtrain.nn.model import Batch
from shardtrain.sharding.divide import check_microbatches


def microbatches(batch: Batch, count: int, key: str) -> Batch:
    """Turn `[B, ...]` leaves into `[B / M, M, ...]`, for M = `count` microbatches.

    Args:
      batch: the leaves of a batch.
      count: M.
      key: the setting of `count`, for messages.

    Raises:
      UserError: the number of rows is not divisible by `count`.
    """

    def split(a: jax.Array) -> jax.Array:
        check_microbatches(key, count, a.shape[0])
        return a.reshape(a.shape[0] // count, count, *a.shape[1:])

    return jax.tree.map(split, batch)


def microbatch(batch_M: Any, m: jax.Array | int) -> Any:
    """Take microbatch `m` of the leaves that `microbatches` made; its rows stay on the devices that hold them."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, m, 1, keepdims=False), batch_M)
