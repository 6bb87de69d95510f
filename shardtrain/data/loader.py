"""Rows to global, sharded batches, in an order that depends on the seed alone.

The rows of all epochs form one endless list, each epoch a new permutation of the source. Batch t of a run is
the next `global_batch` rows of that list, on any mesh and any number of processes; a process reads those of
them that its own devices hold.
"""

import math
import types
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.data.source import Row, Source
from shardtrain.errors import UserError

Batch = dict[str, jax.Array]
State = dict[str, int | str]


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
        prefetch: batches made and sent to the devices ahead, while steps run; 0 makes each when it is asked for.
        threads: that make them, a batch each, at most `prefetch` at a time. More than one is for a source that waits,
            for a network say; otherwise they wait for the interpreter, and two deliver two thirds of what one does.

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
        threads: int = 1,
    ):
        self._source, self._global_batch, self._sharding = source, global_batch, sharding
        _check_sizes(source, global_batch, seed, prefetch, threads)
        self._next_row = 0 if state is None else _restore(state, source)
        self._local_rows = self._rows_of_this_process()
        import grain  # only here: it imports Orbax, too, which takes 0.2 s

        order = grain.MapDataset.range(len(source))  # of numbers alone: Grain walks and measures what passes it
        self._order = (order.seed(seed).shuffle() if shuffle else order).repeat()
        self._check_first_row()
        self._prefetch = prefetch
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: deque[Future[Batch]] = deque()
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
        return bool(self._ahead) and self._ahead[0].done()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this loader is closed")
        self._make_ahead(max(1, self._prefetch))
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()  # a loader that went on after an error would leave a batch out
            raise
        self._next_row += self._global_batch
        self._make_ahead(self._prefetch)
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
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _make_ahead(self, batches: int) -> None:
        while len(self._ahead) < batches:
            first = self._next_row + len(self._ahead) * self._global_batch
            self._ahead.append(self._threads.submit(self._batch, first))

    def _batch(self, first: int) -> Batch:
        """The batch that begins at row `first` of the endless list, on the devices."""
        rows = [self._row(first + int(row)) for row in self._local_rows]
        local = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        local["row"] = self._local_rows.astype(np.int32)
        return {name: self._to_devices(leaf) for name, leaf in local.items()}

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


def _check_sizes(source: Source, global_batch: int, seed: int, prefetch: int, threads: int) -> None:
    for name, value, least in (
        ("data.global_batch", global_batch, 1),
        ("seed", seed, 0),
        ("prefetch", prefetch, 0),
        ("threads", threads, 1),
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
