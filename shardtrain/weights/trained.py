"""Which weights train: patterns over their paths and roles, and the part of a tree that trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from jax.tree_util import tree_map_with_path

from shardtrain.errors import UserError, did_you_mean
from shardtrain.weights.paths import dotted, flatten
from shardtrain.weights.weight import Role, Weight

#: Matches every weight.
ALL = ("*",)
_ROLE = "role:"
Tree = dict[str, Any]  # nested dicts with str keys


def marked(weights: Tree, trains: Sequence[str] = ALL, freeze: Sequence[str] = ()) -> Tree:
    """Return the declarations with `Weight.trains` set: a weight trains if `trains` matches it and `freeze` does not.

    A pattern is a dotted path or the start of one, with `*` for any text (`blocks.layer.attention`, `*.norm`), or
    `role:` and a role (`role:embedding`). All layers of a stack are one weight.

    Args:
      weights: nested dicts of `Weight`.
      trains: patterns of the weights that may train.
      freeze: patterns of the weights that do not.

    Raises:
      UserError: a pattern matches no weight, or no weight is left to train.
    """
    flat = flatten(weights)
    chosen = {key: _matched(f"optimizer.{key}", patterns, flat) for key, patterns in _named(trains, freeze).items()}
    left = chosen["trains"] - chosen["freeze"]
    if not left:
        rule = "no weight is left to train"
        raise UserError("optimizer.freeze", list(freeze), rule, "freeze fewer weights, or let more of them train")
    if len(left) == len(flat):
        return weights
    return tree_map_with_path(lambda path, w: dataclasses.replace(w, trains=dotted(path) in left), weights)


def trained(tree: Tree, weights: Tree) -> Tree:
    """Return the part of a tree that trains: the same nested dicts, without the leaves of frozen weights.

    Args:
      tree: nested dicts like `weights`, with any leaves.
      weights: nested dicts of `Weight`.
    """
    return {
        name: trained(tree[name], inner) if isinstance(inner, dict) else tree[name]
        for name, inner in weights.items()
        if isinstance(inner, dict) or inner.trains
    }


def merged(part: Any, tree: Any) -> Any:
    """Return `tree` with the leaves of `part`, which has some of its leaves, in their places."""
    if not isinstance(tree, dict):
        return part
    return {name: merged(part[name], inner) if name in part else inner for name, inner in tree.items()}


def _named(trains: Sequence[str], freeze: Sequence[str]) -> dict[str, Sequence[str]]:
    named = {"trains": trains, "freeze": freeze}
    for key, patterns in named.items():
        if isinstance(patterns, str):
            raise UserError(f"optimizer.{key}", patterns, "must be a list of patterns", f"write [{patterns!r}]")
    return named


def _matched(key: str, patterns: Sequence[str], flat: dict[str, Weight]) -> set[str]:
    """The paths that some pattern matches."""
    found: set[str] = set()
    for pattern in patterns:
        if not (paths := {path for path, weight in flat.items() if _matches(pattern, path, weight)}):
            known = [_ROLE + role for role in get_args(Role)] if pattern.startswith(_ROLE) else _prefixes(flat)
            raise UserError(key, pattern, "matches no weight of this model", did_you_mean(pattern, known))
        found |= paths
    return found


def _matches(pattern: str, path: str, weight: Weight) -> bool:
    if pattern.startswith(_ROLE):
        return weight.role == pattern.removeprefix(_ROLE)
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def _prefixes(flat: dict[str, Weight]) -> list[str]:
    """All paths and starts of paths, the shortest first."""
    parts = [path.split(".") for path in flat]
    starts = {".".join(keys[:n]) for keys in parts for n in range(1, len(keys) + 1)}
    return sorted(starts, key=lambda start: (start.count("."), start))
