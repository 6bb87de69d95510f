"""Tiny models and batches that the tests share."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.sharding import Partitioner
from shardtrain.sharding.mesh import MeshSpec
from shardtrain.train.model_def import ModelDef

SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab_size": 64}
ROWS, LENGTH = 16, 16


def partitioner(**sizes: int) -> Partitioner:
    """A partitioner over as many of the eight devices as the sizes need."""
    devices = jax.devices()[: int(np.prod(list(sizes.values()) or [1]))]
    return Partitioner(MeshSpec(**sizes).build(devices))


def llama(dtype: Any = jnp.float32, **options: Any) -> ModelDef:
    """A tiny Llama, `SIZES` with `options` over them."""
    precision = Precision(dtype, dtype, dtype)
    return ModelDef(lambda rngs: Llama(**{**SIZES, **options}, precision=precision, rngs=rngs))


@cache
def _host_batch(rows: int, length: int, vocab: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, vocab, (rows, length), dtype=np.int32),
        "targets": rng.integers(0, vocab, (rows, length), dtype=np.int32),
        # Unequal token counts in every row, so that a mean of means would be wrong.
        "loss_mask": (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.float32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "row": np.arange(rows, dtype=np.int32),
    }


def batch(
    place: Partitioner | None = None,
    *,
    rows: int = ROWS,
    length: int = LENGTH,
    vocab: int = 64,
    seed: int = 0,
):
    """A random batch with uneven masks, laid out on a mesh."""
    host = _host_batch(rows, length, vocab, seed)
    if place is None:
        return host
    return {name: jax.device_put(a, place.sharding(("batch", "seq")[: a.ndim])) for name, a in host.items()}


def relative_error(got: Any, want: Any) -> float:
    """Largest difference between two trees, each leaf relative to the largest element of the wanted one."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(
        float(
            np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / (np.abs(np.asarray(b)).max() + 1e-30)
        )
        for a, b in pairs
    )
