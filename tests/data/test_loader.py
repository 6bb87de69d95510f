"""The loader: the order of rows, where to continue, and how batches lie on a mesh of 8 devices."""

import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.data import Loader, SyntheticTokens, split
from shardtrain.errors import UserError

SPEC = P(("data", "fsdp"), "context")
MESHES = [  # pipe, data, fsdp, context, tensor
    (1, 1, 1, 1, 1),
    (1, 2, 4, 1, 1),
    (2, 2, 1, 1, 2),
    (2, 1, 2, 1, 2),
    (1, 2, 2, 2, 1),
    (4, 1, 1, 1, 2),
]


def sharding(*sizes):
    sizes = sizes or (2, 2, 1, 1, 2)
    axes = ("pipe", "data", "fsdp", "context", "tensor")
    devices = jax.devices()[: int(np.prod(sizes))]
    return NamedSharding(jax.make_mesh(sizes, axes, (AxisType.Auto,) * 5, devices=devices), SPEC)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Row i is all i, and may fail."""

    rows: int
    fingerprint: str = "numbered"
    vocab_size: int = 1 << 30
    broken: int = -1

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        if row == self.broken:
            raise UserError(f"row {row} is broken")
        return {"tokens": np.full(4, row, np.int32), "weight": np.float32(row)}


def numbers(source, batches, *, global_batch=4, seed=0, **options):
    """The row numbers of some batches, one after the other, and the state after them."""
    with Loader(source, global_batch=global_batch, seed=seed, sharding=sharding(), **options) as loader:
        got = [int(number) for _ in range(batches) for number in np.asarray(next(loader)["weight"])]
        return got, loader.state


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 30), global_batch=st.sampled_from([2, 4, 6]), seed=st.integers(0, 2**63))
def test_each_epoch_is_a_permutation_that_the_seed_alone_decides(rows, global_batch, seed):
    batches = 3 * rows // global_batch + 1
    got, state = numbers(Numbered(rows), batches, global_batch=global_batch, seed=seed)
    for epoch in range(len(got) // rows):
        assert sorted(got[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    consumed = batches * global_batch
    assert state == {"epoch": consumed // rows, "next_row": consumed, "fingerprint": "numbered"}
    assert numbers(Numbered(rows), batches, global_batch=global_batch, seed=seed) == (got, state)


def test_seeds_and_epochs_have_different_orders():
    orders = [tuple(numbers(Numbered(100), 50, seed=seed)[0]) for seed in range(4)]
    epochs = [order[start : start + 100] for order in orders for start in (0, 100)]
    assert len(set(epochs)) == 8
    assert numbers(Numbered(6), 3, shuffle=False)[0] == [0, 1, 2, 3, 4, 5] * 2


@settings(max_examples=25, deadline=None)
@given(
    before=st.integers(0, 9),
    sizes=st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8])),
    prefetch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_continuing_from_a_state_gives_the_rows_that_were_next(before, sizes, prefetch, shuffle):
    """In the middle of an epoch too, and with another global batch."""
    source, options = Numbered(11), {"shuffle": shuffle, "seed": 3}
    whole, _ = numbers(source, 40, global_batch=2, **options)
    _, state = numbers(source, before, global_batch=sizes[0], prefetch=prefetch, **options)
    state = json.loads(json.dumps(state))
    after, _ = numbers(source, 3, global_batch=sizes[1], state=state, **options)
    start = before * sizes[0]
    assert after == whole[start : start + 3 * sizes[1]]


def test_batches_made_ahead_do_not_count():
    with Loader(Numbered(50), global_batch=4, seed=0, sharding=sharding(), prefetch=3) as loader:
        assert loader.state["next_row"] == 0
        for batches in range(1, 4):
            next(loader)
            assert loader.state["next_row"] == 4 * batches
    assert loader.state["next_row"] == 12, "readable after closing"


@pytest.mark.parametrize("sizes", MESHES)
def test_the_global_batch_does_not_depend_on_the_mesh(sizes):
    source = SyntheticTokens(seq_len=6, vocab_size=50, seed=1, rows=20)
    with (
        Loader(source, global_batch=8, seed=0, sharding=sharding(1, 1, 1, 1, 1)) as single,
        Loader(source, global_batch=8, seed=0, sharding=sharding(*sizes)) as loader,
    ):
        for _ in range(4):
            expected, batch = next(single), next(loader)
            assert batch.keys() == {"tokens", "targets", "loss_mask", "positions", "row"}
            for name, leaf in batch.items():
                np.testing.assert_array_equal(leaf, expected[name])
                assert leaf.dtype == (np.float32 if name == "loss_mask" else np.int32)
                assert leaf.sharding.spec == P(*SPEC[: leaf.ndim])
                assert leaf.shape == ((8,) if name == "row" else (8, 6))
            np.testing.assert_array_equal(batch["row"], np.arange(8))


@pytest.mark.parametrize("prefetch", [1, 2])
def test_the_next_batch_goes_to_the_devices_while_the_step_runs(prefetch):
    """Without another call, and by a thread that is not the one that trains."""
    readers = {}

    class Watched(Numbered):
        def __getitem__(self, row):
            readers[row] = threading.current_thread()
            return super().__getitem__(row)

    with Loader(Watched(40), global_batch=4, seed=0, sharding=sharding(), shuffle=False, prefetch=prefetch) as loader:
        readers.clear()  # of the check of the first row
        next(loader)
        deadline = time.monotonic() + 30
        while not loader.ready and time.monotonic() < deadline:
            time.sleep(0.01)
        assert loader.ready
        assert set(readers) >= set(range(8))
        assert threading.current_thread() not in readers.values()
        assert loader.state["next_row"] == 4


def test_threads_wait_for_a_source_at_the_same_time():
    together, here = threading.Barrier(2), threading.current_thread()

    class Waiting(Numbered):
        def __getitem__(self, row):
            if row % 2 == 0 and threading.current_thread() is not here:
                together.wait(30)  # a batch's first row comes once that of another batch is asked for
            return super().__getitem__(row)

    options = {"global_batch": 2, "seed": 0, "sharding": sharding(1, 1, 1, 1, 1), "shuffle": False}
    with Loader(Waiting(40), **options, threads=2) as loader:
        assert [next(loader)["tokens"][0, 0] for _ in range(4)] == [0, 2, 4, 6]


def test_close_ends_the_threads():
    before = set(threading.enumerate())

    def started():
        return set(threading.enumerate()) - before

    with Loader(Numbered(50), global_batch=4, seed=0, sharding=sharding()) as loader:
        next(loader)
        assert started()
    loader.close()
    deadline = time.monotonic() + 10
    while started() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started() == set()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_a_source_comes_through_and_ends_the_loader(prefetch):
    source = Numbered(20, broken=13)
    loader = Loader(source, global_batch=4, seed=0, sharding=sharding(), shuffle=False, prefetch=prefetch)
    for _ in range(3):
        next(loader)
    with pytest.raises(UserError, match="row 13 is broken"):
        next(loader)
    assert loader.state["next_row"] == 12
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_other_data_is_refused():
    train, held_out = split(SyntheticTokens(seq_len=4, vocab_size=8, seed=0, rows=20), 0.25)
    with Loader(train, global_batch=4, seed=0, sharding=sharding()) as loader:
        state = loader.state
    with pytest.raises(UserError, match=r"(?s)this run was trained on: .*rows=0:15\n.*rows=15:20\nrestore the data"):
        Loader(held_out, global_batch=4, seed=0, sharding=sharding(), state=state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"epoch": 1, "next_row": 4, "fingerprint": "numbered"},
            "row 4 is not in that epoch of a source of 50 rows",
        ),
        ({"epoch": -1, "next_row": -4, "fingerprint": "numbered"}, "row -4 is not in that epoch"),
        ({"epoch": 0}, "fingerprint, next_row missing; use another checkpoint"),
    ],
)
def test_a_damaged_state_is_refused(state, message):
    with pytest.raises(UserError, match=message):
        Loader(Numbered(50), global_batch=4, seed=0, sharding=sharding(), state=state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": Numbered(0)}, "a source of 0 rows: it must have at least 1 and fewer than 4294967296"),
        ({"source": Numbered(1 << 32)}, "a source of 4294967296 rows: it must have"),
        ({"global_batch": 0}, "data.global_batch 0: it must be at least 1"),
        ({"seed": -1}, "seed -1: it must be at least 0"),
        ({"prefetch": -1}, "prefetch -1: it must be at least 0"),
        ({"threads": 0}, "threads 0: it must be at least 1"),
        ({"global_batch": 10, "mesh": (1, 2, 2, 2, 1)}, r"batch has shape \(10,\): dim 0"),
        (
            {"source": SyntheticTokens(seq_len=5, vocab_size=8, seed=0), "mesh": (1, 2, 2, 2, 1)},
            r"rows' 'tokens', a batch of which has shape \(4, 5\): dim 1 of size 5 must be divisible by the mesh "
            r"axes context 2 = 2; use a multiple of 2, or a smaller mesh axis",
        ),
    ],
)
def test_sizes_that_make_no_sense(changes, message):
    arguments = {"source": Numbered(9), "mesh": (), "global_batch": 4, "seed": 0} | changes
    source, mesh = arguments.pop("source"), arguments.pop("mesh")
    with pytest.raises(UserError, match=message):
        Loader(source, sharding=sharding(*mesh), **arguments)


def test_a_source_must_leave_the_name_row_to_the_loader():
    class Named(Numbered):
        def __getitem__(self, row):
            return {"row": np.int32(row)}

    with pytest.raises(UserError, match="must not have a leaf 'row', because the loader adds it; rename it"):
        Loader(Named(9), global_batch=4, seed=0, sharding=sharding())
