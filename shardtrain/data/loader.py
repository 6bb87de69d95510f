"""Rows to global, sharded batches, in an order that depends on the seed alone.

The rows of all epochs form one endless list, in which each epoch is a new permutation of the source. Batch t of a run
is the next `global_batch` rows of that list, on any mesh and with any number of processes. A process reads those rows
of the batch that its own devices hold.
"""

import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.data.arguments import check_divides, check_sharding, check_sizes, check_source, restore
from shardtrain.data.growth import BatchGrowth
from shardtrain.data.rows import MASK, RowCheck, check_last_batch
from shardtrain.data.source import Source

Batch = dict[str, jax.Array]
State = dict[str, int | str]


class Loader:
    """An iterator over global batches: dicts of arrays [B, ...], and `row` int32 [B] = 0 .. B - 1.

    It is endless unless `epochs` is given. `state` counts the batches that were returned, not those made ahead, and is
    the same in every process. Close a loader, or use it in a `with` statement, to end its threads. Use it from one
    thread.

    Args:
      source: the rows; see `Source`.
      global_batch: B, the number of rows in a batch over all devices.
      seed: determines the order of rows.
      sharding: of a [B, S] leaf, such as `P(("data", "fsdp"), "context")` on a mesh. A leaf with fewer dims
        takes the first entries of its spec.
      state: where to continue: the `state` of an earlier loader. Another `global_batch` is allowed; batches then
        begin at the next row that was not consumed.
      shuffle: False gives the rows in the order of the source, in every epoch.
      prefetch: number of batches made and sent to the devices ahead, while steps run. 0 makes each on demand.
      threads: number of threads that make batches, at most `prefetch` at a time. More than one helps a source that
        waits, for a network say. Otherwise they wait for the interpreter, and two deliver two thirds of what one does.
      growth: sizes of the batches while they grow; the last size is `global_batch`.
      epochs: end after this many passes over the source, in each of which every row counts once: rows that fill up
        the last batch have a `loss_mask` of 0. For `evaluate`, use 1 and `shuffle` False.

    Raises:
      UserError: the source is not one or is empty, sizes do not divide, or the state is of other data; while it runs, a
        row is not like the others, or holds ids that are not in the source's vocabulary.
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
        epochs: int | None = None,
        growth: BatchGrowth | None = None,
    ):
        check_source(source)
        check_sizes(source, global_batch, seed, prefetch, threads, epochs)
        check_sharding(sharding)
        self._source, self._global_batch, self._sharding = source, global_batch, sharding
        self._next_row = 0 if state is None else restore(state, source)
        self._growth = growth
        self._local_rows = {size: self._rows_of_this_process(size) for size in self._sizes}
        import grain  # only here: it also imports Orbax, which takes 0.2 s

        order = grain.MapDataset.range(len(source))  # numbers only: Grain walks and measures its elements
        self._order = (order.seed(seed).shuffle() if shuffle else order).repeat()
        self._end = None if epochs is None else max(self._next_row, epochs * len(source))
        self._rows = self._check_first_row()
        self._prefetch = prefetch
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: deque[tuple[Future[Batch], int]] = deque()  # and the row after each
        self._closed = False

    @property
    def state(self) -> State:
        """`next_row` in the endless list, its `epoch`, and the `fingerprint` of the source."""
        return {
            "epoch": self._next_row // len(self._source),
            "next_row": self._next_row,
            "fingerprint": self._source.fingerprint,
        }

    @property
    def endless(self) -> bool:
        """Whether it never ends."""
        return self._end is None

    @property
    def ready(self) -> bool:
        """Whether the next batch is on the devices already, so that `next` returns at once."""
        return bool(self._ahead) and self._ahead[0][0].done()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._next_row == self._end:
            self.close()
            raise StopIteration
        if self._closed:
            raise ValueError("this loader is closed")
        self._make_ahead(max(1, self._prefetch))
        try:
            future, after = self._ahead.popleft()
            batch = future.result()
        except BaseException:
            self.close()  # a loader that continued after an error would leave out a batch
            raise
        self._next_row = after
        self._make_ahead(self._prefetch)
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, each after its present batch. `state` stays readable."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _make_ahead(self, batches: int) -> None:
        while len(self._ahead) < batches:
            first = self._ahead[-1][1] if self._ahead else self._next_row
            if first == self._end:
                return
            size = self._global_batch if self._growth is None else self._growth.size(first)
            self._ahead.append((self._threads.submit(self._batch, first, size), self._until(first + size)))

    def _batch(self, first: int, size: int) -> Batch:
        """Make the batch of `size` rows that begins at row `first` of the endless list, on the devices."""
        local_rows = self._local_rows[size]
        numbers = first + local_rows
        fill = numbers >= (math.inf if self._end is None else self._end)
        chosen = [int(self._order[int(number)]) for number in np.where(fill, first, numbers)]
        local = self._rows.stack([self._source[row] for row in chosen], chosen)
        if fill.any():
            local[MASK][fill] = 0
        local["row"] = local_rows.astype(np.int32)
        return {name: self._to_devices(leaf, size) for name, leaf in local.items()}

    def _to_devices(self, local: np.ndarray, B: int) -> jax.Array:
        """Make the global array [B, ...] from `local`, the rows of this process in global order."""

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # None stands for devices of other processes
            start, stop, _ = index[0].indices(B)
            # A device holds consecutive rows, so all of them are consecutive here too.
            offset = int(np.searchsorted(self._local_rows[B], start))
            return local[offset : offset + stop - start, *index[1:]]

        return jax.make_array_from_callback((B, *local.shape[1:]), self._sharding_of(local.ndim), shard)

    def _sharding_of(self, ndim: int) -> NamedSharding:
        return NamedSharding(self._sharding.mesh, PartitionSpec(*self._sharding.spec[:ndim]))

    @property
    def _sizes(self) -> list[int]:
        return [self._global_batch] if self._growth is None else self._growth.sizes

    def _rows_of_this_process(self, B: int) -> np.ndarray:
        """Return which rows of each batch of B to read: by device, never by process index."""
        sharding = self._sharding_of(1)
        check_divides(sharding, (B,), "data.global_batch")
        held = np.zeros(B, bool)
        for index in sharding.addressable_devices_indices_map((B,)).values():
            held[index] = True
        return np.flatnonzero(held)

    def _until(self, row: int) -> int:
        """Return a row of the endless list, or the end."""
        return row if self._end is None else min(row, self._end)

    def _check_first_row(self) -> RowCheck:
        # Also makes Grain build its lazy parts here, before there are threads.
        rows = RowCheck(self._source, int(self._order[self._next_row + int(self._local_rows[self._sizes[0]][0])]))
        for name, leaf in rows.first.items():
            shape = (self._global_batch, *leaf.shape)
            check_divides(self._sharding_of(len(shape)), shape, f"rows' {name!r}, a batch of which")
        if self._end is not None:
            check_last_batch(self._source, rows.first, self._end - self._next_row, self._global_batch)
        return rows
