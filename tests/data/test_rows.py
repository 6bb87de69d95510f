"""What a source and its rows must be: each mistake names the source, the row, the leaf, what came and what is right."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.data import Loader, SyntheticTokens, split
from shardtrain.data.rows import counted_targets
from shardtrain.errors import UserError

GOOD = SyntheticTokens(seq_len=4, vocab_size=64, seed=0, rows=20)


class Mine:
    """Rows that a user made; `row` 5 or the first is spoilt."""

    fingerprint = "mine"
    vocab_size = 64

    def __init__(self, spoil, at):
        self.spoil, self.at = spoil, at

    def __len__(self):
        return 20

    def __getitem__(self, row):
        return self.spoil(GOOD[row]) if row == self.at else GOOD[row]


def load(source, **options):
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    options = {"global_batch": 4, "seed": 0, "sharding": NamedSharding(mesh, P("data")), "shuffle": False, **options}
    with Loader(source, **options) as loader:
        for _ in range(3):
            next(loader)


def put(name, leaf):
    return lambda row: row | {name: leaf(row[name]) if callable(leaf) else leaf}


BAD = {
    "no dict": (lambda row: list(row.values()), "is of type list; it must be a dict of NumPy arrays by name"),
    "empty": (lambda row: {}, "is an empty dict; it must be a dict of NumPy arrays by name"),
    "list": (put("tokens", np.ndarray.tolist), "'tokens' is of type list; it must be a NumPy array"),
    "none": (put("tokens", None), "'tokens' is of type NoneType; it must be a NumPy array"),
    "0-d": (put("tokens", np.int32(3)), "'tokens' has shape (); it must have one entry per position"),
    "int64": (put("tokens", np.int64), "'tokens' is int64; it must be int32; use .astype(np.int32)"),
    "float64": (put("loss_mask", np.float64), "'loss_mask' is float64; it must be float32; use .astype(np.float32)"),
    "length": (put("positions", np.zeros(3, np.int32)), "'positions' has shape (3,); it must have one entry per"),
    "id": (put("tokens", np.int32([0, 63, 64, 0])), "'tokens' holds 64 at position 2; ids must be in 0 .. 63 for its"),
    "negative": (put("tokens", np.int32([0, -1, 0, 0])), "'tokens' holds -1 at position 1; ids must be in 0 .. 63"),
    "target": (put("targets", np.int32([0, 0, 0, 99])), "'targets' holds 99 at position 3; targets must be below its"),
}
OTHER = {  # than the other rows
    "fewer": (
        lambda row: {"tokens": row["tokens"]},
        "has the names tokens; other rows have tokens, targets, loss",
    ),
    "more": (
        lambda row: row | {"x": np.float32(0)},
        "has the names tokens, targets, loss_mask, positions",
    ),
    "longer": (
        lambda row: {name: np.tile(leaf, 2) for name, leaf in row.items()},
        "'tokens' is int32 of shape (8,); it must be int32 of shape (4,), as in other rows",
    ),
}


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_none(name, at):
    spoil, message = BAD[name]
    with pytest.raises(UserError, match=re.escape(f"source Mine, row {at}: {message}")):
        load(Mine(spoil, at))


@pytest.mark.parametrize("name", OTHER)
def test_a_row_that_is_not_as_the_others(name):
    spoil, message = OTHER[name]
    with pytest.raises(UserError, match=re.escape(f"source Mine, row 5: {message}")):
        load(Mine(spoil, 5))


def test_targets_count_unless_a_mask_leaves_them_out():
    targets = np.array([3, -1, 5], np.int32)
    assert counted_targets({"targets": targets}).tolist() == [3, 5]
    assert counted_targets({"targets": targets, "loss_mask": np.array([0, 1, 0.5])}).tolist() == [5]
    assert counted_targets({"x": targets}).tolist() == []


def test_masked_targets_are_negative():
    load(Mine(put("targets", np.int32([-100, -1, 3, 63])), 5))


def test_rows_without_tokens_may_hold_what_they_like_but_what_jax_would_change():
    class Images:
        fingerprint, wrong = "images", None

        def __len__(self):
            return 20

        def __getitem__(self, row):
            good = {"image": np.zeros((2, 2), np.uint8), "label": np.float32(row), "tagged": np.bool_(True)}
            return good if self.wrong is None else good | {"label": self.wrong}

    images = Images()
    load(images)
    for images.wrong, message in (
        (np.float64(1), "'label' is float64; JAX would silently convert it to float32; use .astype(np.float32)"),
        (np.zeros(2, np.uint64), "'label' is uint64; JAX would silently convert it to uint32"),
        (1.0, "'label' is of type float; it must be a NumPy array"),
        (np.array("x"), "'label' is <U1; it must hold numbers"),
    ):
        with pytest.raises(UserError, match=re.escape(f"source Images, row 0: {message}")):
            load(images)
    with jax.enable_x64(True):
        images.wrong = np.float64(1)
        load(images)


def test_what_is_no_source():
    class Part:
        def __len__(self):
            return 20

    class Nameless(Mine):
        fingerprint = 3

    class Unbounded(Mine):
        vocab_size = None

    parts = "__len__, __getitem__ and fingerprint (shardtrain.data.Source)"
    for source, message in (
        ([GOOD[0], GOOD[1]], f"source is a list; give an object with {parts}"),
        (SyntheticTokens, f"source is the class SyntheticTokens; give an object with {parts}"),
        (Part(), f"source Part has no __getitem__, no fingerprint; a source is an object with {parts}"),
        (None, f"source NoneType has no __len__, no __getitem__, no fingerprint; a source is an object with {parts}"),
        (Nameless(None, -1), "source Nameless: its fingerprint is 3; it must be a str"),
        (Unbounded(None, -1), "source Unbounded: its vocab_size is None; a source of tokens must have one, above all"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load(source)


def test_a_part_of_a_source_is_named_as_the_source():
    with pytest.raises(UserError, match="source Mine, row 0: is of type list"):
        load(split(Mine(lambda row: [], 0), 0.25)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 2.5}, "data.global_batch 2.5: it must be a whole number"),
        ({"global_batch": True}, "data.global_batch True: it must be a whole number"),
        ({"seed": None}, "seed None: it must be a whole number"),
        ({"sharding": P("data")}, "it must be a jax.sharding.NamedSharding, such as"),
        ({"sharding": None}, "sharding None: it must be a jax.sharding.NamedSharding, such as"),
        ({"state": 3}, "data state 3 is of type int; give the `state` of a loader"),
    ],
)
def test_what_else_a_loader_is_handed(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(GOOD, **changes)
