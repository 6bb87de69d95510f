"""The checks of the arguments of a `Loader`, one function for each."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from shardtrain.data.rows import name_of
from shardtrain.data.source import Source
from shardtrain.errors import UserError
from shardtrain.sharding import count_shards, mesh_axes
from shardtrain.sharding.mesh import times


def check_source(source: Any) -> None:
    """Check that an object is a source.

    Raises:
      UserError: it is not, such as a list of rows, a class, or an object that lacks one of the parts.
    """
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
    """Check the numbers that a loader is given, and the length of its source.

    Raises:
      UserError: one of them is not a whole number or too small; or the source is empty or too long.
    """
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
    # Grain's shuffle computes in 32 bits and would silently return wrong rows.
    if not 1 <= len(source) < 1 << 32:
        raise UserError(f"a source of {len(source)} rows: it must have at least 1 and fewer than {1 << 32}")


def check_sharding(sharding: Any) -> None:
    """Check that an object is a sharding on a mesh.

    Raises:
      UserError: it is something else.
    """
    if not isinstance(sharding, NamedSharding):
        raise UserError(
            f"sharding {sharding!r}: it must be a jax.sharding.NamedSharding, such as Partitioner.sharding makes for "
            f'("batch", "seq"), not {type(sharding).__name__}'
        )


def check_divides(sharding: NamedSharding, shape: tuple[int, ...], what: str) -> None:
    """Check that the dims of an array are multiples of the mesh axes that split them.

    Args:
      sharding: of the array.
      shape: of the array.
      what: name of the array, for the message.

    Raises:
      UserError: one is not; names the dim.
    """
    for dim, part in enumerate(sharding.spec):
        shards = count_shards(sharding.mesh, part)
        if shape[dim] % shards:
            split = times({axis: sharding.mesh.shape[axis] for axis in mesh_axes(part)})
            raise UserError(
                f"{what} has shape {shape}: dim {dim} of size {shape[dim]} must be divisible by the mesh axes {split}; "
                f"use a multiple of {shards}, or a smaller mesh axis"
            )


def restore(state: Mapping[str, Any], source: Source) -> int:
    """Return the `next_row` of the state of a loader.

    Raises:
      UserError: the state is damaged, or belongs to another source.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"data state {state!r} is of type {type(state).__name__}; give the `state` of a loader")
    missing = {"epoch", "next_row", "fingerprint"} - set(state)
    if missing:
        raise UserError(f"data state {dict(state)}: {', '.join(sorted(missing))} missing; use another checkpoint")
    if state["fingerprint"] != source.fingerprint:
        raise UserError(
            f"the data differs from what this run was trained on: it was\n  {state['fingerprint']}\nand is now\n  "
            f"{source.fingerprint}\nrestore the data and its settings, or start a new run"
        )
    next_row = int(state["next_row"])
    if next_row < 0 or state["epoch"] != next_row // len(source):
        raise UserError(
            f"data state {dict(state)}: row {next_row} is not in that epoch of a source of {len(source)} "
            f"rows; the checkpoint is damaged, so use another one"
        )
    return next_row
