"""What a `Loader` is handed: one check for each of its arguments."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from shardtrain.data.rows import name_of
from shardtrain.data.source import Source
from shardtrain.errors import UserError


def check_source(source: Any) -> None:
    """Raises UserError for what is no source: a list of rows, a class, an object without one of the parts."""
    parts = "__len__, __getitem__ and fingerprint (shardtrain.data.Source)"
    if isinstance(source, list | tuple | dict | type):
        what = f"the class {source.__name__}" if isinstance(source, type) else f"a {type(source).__name__}"
        raise UserError(f"source is {what}; give an object with {parts}")
    missing = [part for part in ("__len__", "__getitem__", "fingerprint") if not hasattr(source, part)]
    if missing:
        raise UserError(f"{name_of(source)} has no {', no '.join(missing)}; a source is an object with {parts}")
    if not isinstance(source.fingerprint, str):
        raise UserError(f"{name_of(source)}: its fingerprint is {source.fingerprint!r}; it must be a str")


def check_sizes(source: Source, global_batch: int, seed: int, prefetch: int, threads: int, epochs: int | None) -> None:
    """Raises UserError for numbers that are none, or too small, and for a source that is empty or too long."""
    for name, value, least in (
        ("data.global_batch", global_batch, 1),
        ("seed", seed, 0),
        ("prefetch", prefetch, 0),
        ("threads", threads, 1),
        ("epochs", 1 if epochs is None else epochs, 1),
    ):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise UserError(f"{name} {value!r}: it must be a whole number")
        if value < least:
            raise UserError(f"{name} {value}: it must be at least {least}")
    # Grain's shuffle computes in 32 bits and would return wrong rows without an error.
    if not 1 <= len(source) < 1 << 32:
        raise UserError(f"a source of {len(source)} rows: it must have at least 1 and fewer than {1 << 32}")


def check_sharding(sharding: Any) -> None:
    """Raises UserError for what is no sharding on a mesh."""
    if not isinstance(sharding, NamedSharding):
        raise UserError(
            f"sharding {sharding!r}: it must be a jax.sharding.NamedSharding, such as Partitioner.sharding gives for "
            f'("batch", "seq"), not {type(sharding).__name__}'
        )


def check_divides(sharding: NamedSharding, shape: tuple[int, ...], what: str) -> None:
    """Raises UserError naming the dim of an array that its sharding does not divide."""
    for dim, axes in enumerate(sharding.spec):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        if shape[dim] % parts:
            raise UserError(
                f"{what} has shape {shape}: dim {dim} of size {shape[dim]} must divide by the mesh axes "
                f"{' x '.join(f'{name} {sharding.mesh.shape[name]}' for name in names)} = {parts}; "
                f"use a multiple of {parts}, or a smaller mesh axis"
            )


def restore(state: Mapping[str, Any], source: Source) -> int:
    """Returns the `next_row` of a loader's state. Raises UserError where it is damaged, or of another source."""
    if not isinstance(state, Mapping):
        raise UserError(f"data state {state!r}: it must be what a loader's `state` gave, not {type(state).__name__}")
    missing = {"epoch", "next_row", "fingerprint"} - set(state)
    if missing:
        raise UserError(f"data state {dict(state)}: {', '.join(sorted(missing))} missing; use another checkpoint")
    if state["fingerprint"] != source.fingerprint:
        raise UserError(
            f"the data is not what this run was trained on: it was\n  {state['fingerprint']}\nand is now\n  "
            f"{source.fingerprint}\nput the data and its settings back as they were, or start a new run"
        )
    next_row = int(state["next_row"])
    if next_row < 0 or state["epoch"] != next_row // len(source):
        raise UserError(
            f"data state {dict(state)}: row {next_row} is not in that epoch of a source of {len(source)} "
            f"rows; the checkpoint is damaged, use another"
        )
    return next_row
