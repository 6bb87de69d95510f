"""Tiny models, meshes and batches that the tests share."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.sharding import MeshSpec, Partitioner, make_rules
from shardtrain.train.model_def import ModelDef

SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab_size": 64}
ROWS, LENGTH = 16, 16


def partitioner(rules: Mapping[str, Any] = MappingProxyType({}), **sizes: int) -> Partitioner:
    """A partitioner over as many of the eight devices as the sizes need, with some rules replaced."""
    devices = jax.devices()[: int(np.prod(list(sizes.values()) or [1]))]
    return Partitioner(MeshSpec(**sizes).build(devices), make_rules(rules))


def llama(dtype: Any = jnp.float32, **options: Any) -> ModelDef:
    """A tiny Llama: `SIZES`, overridden by `options`."""
    precision = Precision(dtype, dtype, dtype)
    return ModelDef(lambda rngs: Llama(**{**SIZES, **options}, precision=precision, rngs=rngs))


@cache
def _host_batch(rows: int, length: int, vocab: int, seed: int, packed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    start = rng.integers(1, length, (rows, 1)) if packed else np.full((rows, 1), length)  # of the second document
    position = np.arange(length, dtype=np.int32)[None]
    second = position >= start
    host = {name: rng.integers(0, vocab, (rows, length), dtype=np.int32) for name in ("tokens", "targets")}
    # Unequal weights in every row, so that a mean of means would be wrong.
    mask = rng.integers(0, 3, (rows, length)) if packed else rng.random((rows, length)) < rng.random((rows, 1))
    return host | {
        "loss_mask": mask.astype(np.float32),
        "segment_ids": second.astype(np.int32) + 1,
        "positions": np.where(second, position - start, position).astype(np.int32),
        "row": np.arange(rows, dtype=np.int32),
    }


def batch(
    place: Partitioner | None = None,
    *,
    rows: int = ROWS,
    length: int = LENGTH,
    vocab: int = 64,
    seed: int = 0,
    packed: bool = False,
) -> dict[str, Any]:
    """A random batch with uneven masks, sharded over a mesh if one is given; packed, with two documents in each row."""
    host = _host_batch(rows, length, vocab, seed, packed)
    return host if place is None else placed(host, place)


def placed(host: Mapping[str, np.ndarray], place: Partitioner) -> dict[str, jax.Array]:
    """A batch of host arrays, sharded over a mesh."""
    return {name: jax.device_put(a, place.sharding(("batch", "seq")[: a.ndim])) for name, a in host.items()}


def relative_error(got: Any, want: Any) -> float:
    """The largest difference between two trees, each leaf relative to the largest element of the wanted one."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(
        float(
            np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / (np.abs(np.asarray(b)).max() + 1e-30)
        )
        for a, b in pairs
    )
