"""A loader that ends: each row counts once, whatever the batch, the mesh and the number of processes."""

import functools

import jax
import numpy as np
import pytest

import tiny
from shardtrain import Loader, UserError, evaluate, init_state, make_eval_step, optimizer
from shardtrain.data import SyntheticTokens

ROWS, LENGTH = 13, 8


class Masked(SyntheticTokens):
    """Rows of unequal weight."""

    def __init__(self, rows=ROWS):
        super().__init__(seq_len=LENGTH, vocab_size=64, seed=0, rows=rows)

    def __getitem__(self, row):
        leaves = super().__getitem__(row)
        return leaves | {"loss_mask": np.float32(np.arange(LENGTH) % 3 + row / 8)}


class Bare(Masked):
    """The same, with another name for the mask."""

    def __getitem__(self, row):
        leaves = super().__getitem__(row)
        return leaves | {"weights": leaves.pop("loss_mask")}


def loader(place, global_batch, source=None, **options):
    options = {"epochs": 1, "shuffle": False, **options}
    sharding = place.sharding(("batch", "seq"))
    return Loader(source or Masked(), global_batch=global_batch, seed=0, sharding=sharding, **options)


@functools.cache
def by_hand():
    """The weighted mean over all rows, each of them evaluated alone."""
    place, model = tiny.partitioner(), tiny.llama(n_layers=1)
    state = init_state(model, optimizer("sgd", model.weights, lr=0.1), place, seed=0)
    step, loss, weight = make_eval_step(model, place), 0.0, 0.0
    for row in range(ROWS):
        batch = {name: leaf[None] for name, leaf in Masked()[row].items()} | {"row": np.zeros(1, np.int32)}
        sums = step(state, batch)
        loss, weight = loss + float(sums["loss"][0]), weight + float(sums["loss"][1])
    return loss / weight


@pytest.mark.parametrize(
    ("mesh", "global_batch"),
    [
        pytest.param({}, 5, id="one device"),
        pytest.param({"data": 2}, 4, id="data 2"),
        pytest.param({"data": 2}, 16, id="fewer rows than a batch"),
        pytest.param({"fsdp": 4, "tensor": 2}, 8, id="fsdp 4 x tensor 2"),
    ],
)
def test_an_evaluation_is_the_weighted_mean_over_all_rows(mesh, global_batch):
    place, model = tiny.partitioner(**mesh), tiny.llama(n_layers=1)
    state = init_state(model, optimizer("sgd", model.weights, lr=0.1), place, seed=0)
    step = make_eval_step(model, place)
    with loader(place, global_batch) as batches:
        means = evaluate(step, state, batches)
    assert means["loss"] == pytest.approx(by_hand(), rel=1e-6)
    assert means["cross_entropy"] == pytest.approx(by_hand(), rel=1e-6)
    assert step._cache_size() == 1, "the last batch compiles nothing"


@pytest.mark.parametrize(("epochs", "batches"), [(1, 4), (2, 7), (4, 13)])
def test_only_the_very_last_batch_is_filled_up(epochs, batches):
    place = tiny.partitioner(data=2)
    with loader(place, 4, epochs=epochs, shuffle=True) as rows:
        got = [jax.tree.map(np.asarray, batch) for batch in rows]
        assert next(rows, None) is None
    assert len(got) == batches
    counted = np.concatenate([batch["tokens"][batch["loss_mask"].any(1)] for batch in got])
    assert len(counted) == epochs * ROWS
    for epoch in range(epochs):
        part = {row.tobytes() for row in counted[epoch * ROWS : (epoch + 1) * ROWS]}
        assert part == {Masked()[row]["tokens"].tobytes() for row in range(ROWS)}
    assert {batch["tokens"].shape for batch in got} == {(4, LENGTH)}
    assert rows.state == {"epoch": epochs, "next_row": epochs * ROWS, "fingerprint": Masked().fingerprint}


def test_it_continues_in_the_middle_and_at_the_end():
    place = tiny.partitioner()
    with loader(place, 6) as whole:
        first, *rest = whole
        end = whole.state
    assert first["loss_mask"].shape == (6, LENGTH)
    middle = {"epoch": 0, "next_row": 6, "fingerprint": Masked().fingerprint}
    with loader(place, 6, state=middle) as continued:
        for batch, expected in zip(continued, rest, strict=True):
            jax.tree.map(np.testing.assert_array_equal, batch, expected)
    with loader(place, 6, state=end) as nothing:
        assert list(nothing) == []


def test_rows_that_cannot_say_that_they_do_not_count():
    message = r"source Bare: its rows have no 'loss_mask', and 13 rows do not fill batches of 5: the 2 rows that fill"
    with pytest.raises(UserError, match=message):
        loader(tiny.partitioner(), 5, Bare())
    with loader(tiny.partitioner(), 5, Bare(rows=10)) as full:
        assert len(list(full)) == 2
    with loader(tiny.partitioner(), 5, Bare(), epochs=None) as endless:
        assert next(endless)["weights"].shape == (5, LENGTH)


def test_an_endless_loader_is_no_evaluation():
    with (
        loader(tiny.partitioner(), 5, epochs=None) as endless,
        pytest.raises(UserError, match=r"evaluate got a Loader, which never ends; give the Loader epochs=1 \(each row"),
    ):
        evaluate(None, None, endless)
    assert endless.endless
    with pytest.raises(UserError, match="epochs 0: it must be at least 1"):
        loader(tiny.partitioner(), 5, epochs=0)
