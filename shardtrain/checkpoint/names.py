"""A state tree as a flat dict of dotted paths, so that no container type is stored on disk.

`{"params": {"head": {"kernel": x}}}` and a dataclass with a field `params` both store
`params.head.kernel`; an optax named tuple at position 0 of `opt_state` stores
`opt_state.0.mu.head.kernel`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import UserError

Tree = Any


def flatten(tree: Tree) -> dict[str, Any]:
    """Return the leaves of a pytree by dotted path, in the order of the tree.

    Raises:
      UserError: two leaves share a path, as `{"a.b": x, "a": {"b": y}}` does, or the tree is a bare leaf.
    """
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(key_path, simple=True, separator=".")
        if not name:
            raise UserError("a checkpointed state must be a container such as {'params': ...}, not one array")
        if name in leaves:
            raise UserError(f"two leaves of the state share the path {name!r}: rename one, or drop its dots")
        leaves[name] = leaf
    return leaves


def unflatten(like: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Put `leaves` into the containers of `like`, which has exactly these paths: the inverse of `flatten`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flatten(like)])


def storable(name: str, leaf: Any) -> jax.Array | np.ndarray:
    """Return a leaf as the array that is written. Python numbers take JAX's default dtype.

    Args:
      name: its dotted path, for messages.
      leaf: an array or a number.

    Raises:
      UserError: the leaf is neither an array nor a number.
    """
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    if isinstance(leaf, np.generic):  # Orbax stores arrays without dims, but not NumPy scalars
        return np.asarray(leaf)
    if isinstance(leaf, bool | int | float | complex):
        return jnp.asarray(leaf)
    raise UserError(f"cannot checkpoint {name}: {type(leaf).__name__} is neither an array nor a number")


def restorable(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding to restore a leaf into.

    Args:
      name: its dotted path, for messages.
      leaf: an array or a `jax.ShapeDtypeStruct`.

    Raises:
      UserError: there is no sharding to restore into, or JAX cannot hold the dtype.
    """
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        raise UserError(
            f"cannot restore {name}: {type(leaf).__name__} carries no sharding; "
            "pass jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
        )
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if not is_key and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise UserError(f"cannot restore {name} as {leaf.dtype}: set jax_enable_x64, or ask for another dtype")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
