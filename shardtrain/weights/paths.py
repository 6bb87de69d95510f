"""The stable dotted names of weights: their paths in nested dicts."""

from __future__ import annotations

from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path

Path = tuple[Any, ...]


def dotted(path: Path) -> str:
    """Return a tree path as text: `blocks.layer.attn.query`."""
    return keystr(path, simple=True, separator=".")


def flatten(tree: Any) -> dict[str, Any]:
    """Turn nested dicts into one dict from dotted path to leaf, in key order."""
    return {dotted(path): leaf for path, leaf in tree_leaves_with_path(tree)}
