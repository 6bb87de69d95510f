"""Named arrays and one JSON record per step directory. This is the only file that knows Orbax.

Orbax is imported where it is used: that takes 0.15 s, and a fresh run needs it only when it first saves.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from shardtrain.checkpoint.compare import ArrayInfo

FORMAT_VERSION = 1
"""Version of the format. Raise it when the meaning of paths or of the record changes."""

TEMPORARY = ".orbax-checkpoint-tmp"
"""Orbax writes `<step>.orbax-checkpoint-tmp` and renames it to `<step>` to commit."""

ITEM = "state"


class Commit(Protocol):
    """A save under way."""

    def result(self, timeout: float | None = None) -> None:
        """Wait until the step is committed on all processes; raise what went wrong."""


@dataclass(frozen=True)
class Description:
    """The content of a step, without its arrays.

    Attributes:
      arrays: shape and dtype of each array, by dotted path.
      record: the JSON record.
    """

    arrays: dict[str, ArrayInfo]
    record: dict[str, Any]


def save(path: Path, arrays: Mapping[str, jax.Array | np.ndarray], record: dict[str, Any], *, compress: bool) -> Commit:
    """Start to write a step; return once the arrays are copied to the host and may be donated."""
    from orbax.checkpoint import v1 as ocp

    # When a save fails, every writer thread logs a traceback, some after `Commit.result` has raised to us.
    logging.getLogger("absl").addFilter(_not_of_a_writer_thread)
    context = ocp.Context()
    context.array.saving.use_compression = compress
    # Replicas divide up common arrays by slicing them, with one small program per slice, in the thread that saves. For
    # small norms this took longer than the rest of a save.
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**18
    # Otherwise the writer threads of a save that fails early wait 20 minutes for the directory.
    context.async_options.create_directories_asynchronously = False
    with context:
        return ocp.save_checkpointables_async(path, {ITEM: dict(arrays)}, custom_metadata=record)


def load(path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool) -> dict[str, jax.Array]:
    """Read arrays directly into the requested shardings. `partial`: the step has more arrays than these."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
        return ocp.load_checkpointables(path, {ITEM: dict(wanted)})[ITEM]


def describe(path: Path) -> Description:
    """Return shapes, dtypes and the record, read from metadata alone."""
    from orbax.checkpoint import v1 as ocp

    metadata = ocp.metadata(path, ITEM)
    arrays = {name: ArrayInfo(tuple(x.shape), np.dtype(x.dtype)) for name, x in metadata.metadata.items()}
    return Description(arrays, metadata.custom_metadata or {})


def _not_of_a_writer_thread(entry: logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised an exception" not in entry.getMessage()
