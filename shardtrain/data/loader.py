"""Rows to global, sharded batches, in an order that depends on the seed alone.

The rows of all epochs form one endless list, each epoch a new permutation of the source. Batch t of a run is
the next `global_batch` rows of that list, on any mesh and any number of processes; a process reads those of
them that its own devices hold.
"""

import math
import sys
import types
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.data.source import Row, Source
from shardtrain.errors import UserError

Batch = dict[str, jax.Array]
State = dict[str, int | str]


class _HostBatch(NamedTuple):
    """This process's rows of the batch that begins at row `first` of the endless list."""

    first: int
    rows: Row


class Loader:
    """An endless iterator over global batches: dicts of arrays [B, ...], and `row` int32 [B] = 0 .. B - 1.

    Args:
        source: where the rows come from.
        global_batch: B, the rows in a batch over all devices.
        seed: of the order of rows.
        sharding: of a [B, S] leaf, such as `P(("data", "fsdp"), "context")` on a mesh. A leaf of fewer dims
            takes the first entries of its spec.
        state: where to continue, from the `state` of an earlier loader. Another `global_batch` is allowed:
            batches then begin at the next row that was not consumed.
        shuffle: False gives the rows in the source's order, in every epoch.
        prefetch: host batches made ahead, by as many threads; 0 makes each when it is to be sent. Besides, a thread
            sends one batch ahead to the devices, while the step runs.

    `state` counts the batches that were returned, not those made ahead, and is the same in every process.
    Close a loader, or use it in a `with` statement, to end its threads. One thread uses it.

    Raises UserError for an empty source, sizes that do not divide, and a state of other data.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch: int,
        seed: int,
        sharding: NamedSharding,
        state: Mapping[str, Any] | None = None,
        shuffle: bool = True,
        prefetch: int = 2,
    ):
        self._source, self._global_batch, self._sharding = source, global_batch, sharding
        _check_sizes(source, global_batch, seed, prefetch)
        self._next_row = 0 if state is None else _restore(state, source)
        self._local_rows = self._rows_of_this_process()
        order = grain.MapDataset.range(len(source))  # of numbers alone: Grain walks and measures what passes it
        self._order = (order.seed(seed).shuffle() if shuffle else order).repeat()
        self._check_first_row()
        batches = grain.MapDataset.range(self._next_row, sys.maxsize, global_batch).map(self._host_batch)
        options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
        self._host_batches = iter(batches.to_iter_dataset(options))
        self._transfers = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._on_its_way: Future[tuple[int, Batch]] | None = None
        self._closed = False

    @property
    def state(self) -> State:
        """`next_row` in the endless list, the `epoch` that it lies in, and the source's `fingerprint`."""
        return {
            "epoch": self._next_row // len(self._source),
            "next_row": self._next_row,
            "fingerprint": self._source.fingerprint,
        }

    @property
    def ready(self) -> bool:
        """Whether the next batch lies on the devices, so that `next` returns at once."""
        return self._on_its_way is not None and self._on_its_way.done()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this loader is closed")
        try:
            first, batch = (self._on_its_way or self._transfers.submit(self._transfer)).result()
        except BaseException:
            self.close()  # a loader that went on after an error would leave a batch out
            raise
        self._on_its_way = self._transfers.submit(self._transfer)
        self._next_row = first + self._global_batch
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, each after the batch that it is at. `state` stays readable."""
        self._closed, self._on_its_way = True, None
        self._transfers.shutdown(cancel_futures=True)
        self._host_batches.close()

    def _transfer(self) -> tuple[int, Batch]:
        host = next(self._host_batches)
        return host.first, {name: self._to_devices(leaf) for name, leaf in host.rows.items()}

    def _to_devices(self, local: np.ndarray) -> jax.Array:
        """Makes the global array [B, ...] of which this process has `local`, its own rows in global order."""
        B = self._global_batch

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # None stands for devices of other processes
            start, stop, _ = index[0].indices(B)
            # A device holds consecutive rows, so all of them are consecutive here too.
            offset = int(np.searchsorted(self._local_rows, start))
            return local[offset : offset + stop - start, *index[1:]]

        return jax.make_array_from_callback((B, *local.shape[1:]), self._sharding_of(local.ndim), shard)

    def _sharding_of(self, ndim: int) -> NamedSharding:
        return NamedSharding(self._sharding.mesh, PartitionSpec(*self._sharding.spec[:ndim]))

    def _rows_of_this_process(self) -> np.ndarray:
        """Which rows of each batch to read: by device, never by process index (DESIGN.md, contracts)."""
        B = self._global_batch
        sharding = self._sharding_of(1)
        _check_divides(sharding, (B,), "data.global_batch")
        held = np.zeros(B, bool)
        for index in sharding.addressable_devices_indices_map((B,)).values():
            held[index] = True
        return np.flatnonzero(held)

    def _host_batch(self, first: int) -> _HostBatch:
        rows = [self._row(first + int(row)) for row in self._local_rows]
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return _HostBatch(first, {**stacked, "row": self._local_rows.astype(np.int32)})

    def _row(self, number: int) -> Row:
        """A row of the endless list."""
        return self._source[int(self._order[number])]

    def _check_first_row(self) -> None:
        # Also makes Grain build its lazy parts here, before there are threads.
        row = self._row(self._next_row + int(self._local_rows[0]))
        if "row" in row:
            raise UserError("a source's rows must not have the name 'row': the loader adds it; rename it")
        for name, leaf in row.items():
            shape = (self._global_batch, *leaf.shape)
            _check_divides(self._sharding_of(len(shape)), shape, f"rows' {name!r}, a batch of which")


def _check_sizes(source: Source, global_batch: int, seed: int, prefetch: int) -> None:
    for name, value, least in (
        ("data.global_batch", global_batch, 1),
        ("seed", seed, 0),
        ("prefetch", prefetch, 0),
    ):
        if value < least:
            raise UserError(f"{name} {value}: it must be at least {least}")
    # Grain's shuffle computes in 32 bits and would return wrong rows without an error.
    if not 1 <= len(source) < 1 << 32:
        raise UserError(f"a source of {len(source)} rows: it must have at least 1 and fewer than {1 << 32}")


def _check_divides(sharding: NamedSharding, shape: tuple[int, ...], what: str) -> None:
    for dim, axes in enumerate(sharding.spec):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        if shape[dim] % parts:
            raise UserError(
                f"{what} has shape {shape}: dim {dim} of size {shape[dim]} must divide by the mesh axes "
                f"{' x '.join(f'{name} {sharding.mesh.shape[name]}' for name in names)} = {parts}; "
                f"use a multiple of {parts}, or a smaller mesh axis"
            )


def _restore(state: Mapping[str, Any], source: Source) -> int:
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
