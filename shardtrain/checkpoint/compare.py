"""The differences between a checkpoint and a model, in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and dtype of an array on disk. A random key is stored as its uint32 words."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, leaf: Any) -> "ArrayInfo":
        """The stored form of an array, a random key or a `jax.ShapeDtypeStruct`."""
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return cls(tuple(leaf.shape), np.dtype(leaf.dtype))

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name} {self.shape}"


def differences(saved: Mapping[str, ArrayInfo], wanted: Mapping[str, ArrayInfo], *, cast: bool = False) -> list[str]:
    """Return one line per path on which checkpoint and model differ; none if the checkpoint can be loaded.

    Args:
      saved: the arrays in the checkpoint.
      wanted: the arrays of the model.
      cast: accept another dtype where a cast keeps the meaning: between floats, and to wider integers.
    """
    lines = [f"missing: {name} {wanted[name]}" for name in wanted if name not in saved]
    lines += [f"unexpected: {name} {saved[name]}" for name in saved if name not in wanted]
    for name in wanted:
        if name in saved:
            lines += _leaf_differences(name, saved[name], wanted[name], cast)
    return lines


def _leaf_differences(name: str, saved: ArrayInfo, wanted: ArrayInfo, cast: bool) -> list[str]:
    lines = []
    if saved.shape != wanted.shape:
        lines.append(f"shape: {name} {saved.shape} != {wanted.shape}")
    if saved.dtype != wanted.dtype:
        if not _castable(saved.dtype, wanted.dtype):
            lines.append(f"dtype: {name} {saved.dtype.name} cannot be converted to {wanted.dtype.name}")
        elif not cast:
            lines.append(f"dtype: {name} {saved.dtype.name} != {wanted.dtype.name} (checkpoint.cast=true converts it)")
    return lines


def _castable(saved: np.dtype, wanted: np.dtype) -> bool:
    if jnp.issubdtype(saved, jnp.floating) and jnp.issubdtype(wanted, jnp.floating):
        return True
    both_integers = jnp.issubdtype(saved, jnp.integer) and jnp.issubdtype(wanted, jnp.integer)
    return both_integers and np.can_cast(saved, wanted, "safe")


def hint(saved: Mapping[str, ArrayInfo], wanted: Mapping[str, ArrayInfo]) -> str:
    """Say what to do if only one of the two stores moments as 8-bit codes, which no cast can produce."""

    def has_codes(arrays: Mapping[str, ArrayInfo]) -> bool:
        return any(info.dtype == np.int8 for name, info in arrays.items() if name.startswith("opt_state."))

    if has_codes(saved) == has_codes(wanted):
        return ""
    go_on = "with" if has_codes(saved) else "without"
    return (
        f"\n8-bit moments cannot be converted: continue {go_on} optimizer.moments=int8, or load only the weights "
        "(init_from)"
    )


def summary(lines: list[str], limit: int = 10) -> str:
    """Return the first `limit` lines, indented, and the number of the others."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in lines[:limit] + more)
