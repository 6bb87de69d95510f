"""A batch that grows by data: which rows it takes, over a resume too, and that training sees the same losses."""

import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from loops import trainer

from commands import compiled_once, fit, losses, metrics, train  # noqa: F401
from shardtrain import UserError
from shardtrain.data import BatchGrowth, Loader, SyntheticTokens
from shardtrain.run import Trainer
from shardtrain.sharding import MeshSpec, Partitioner

GROWTH = BatchGrowth(first=2, last=8, rows=12)
SIZES = [2, 2, 2, 4, 4, 8, 8]  # they begin at rows 0, 2, 4, 6, 10, 14, 22


def loader(**options) -> Loader:
    place = Partitioner(MeshSpec(data=2).build(jax.devices()[:2]))
    source = SyntheticTokens(seq_len=4, vocab_size=64, seed=0)
    return Loader(source, global_batch=8, seed=0, sharding=place.sharding(("batch", "seq")), growth=GROWTH, **options)


def test_it_takes_the_rows_in_order_in_batches_that_grow():
    with loader() as grown:
        batches = [np.asarray(next(grown)["tokens"]) for _ in SIZES]
    assert [len(batch) for batch in batches] == SIZES
    place = Partitioner(MeshSpec().build(jax.devices()[:1]))
    source = SyntheticTokens(seq_len=4, vocab_size=64, seed=0)
    with Loader(source, global_batch=sum(SIZES), seed=0, sharding=place.sharding(("batch", "seq"))) as whole:
        np.testing.assert_array_equal(np.concatenate(batches), next(whole)["tokens"])


def test_a_loader_resumes_within_the_growth():
    with loader() as first:
        for _ in range(4):
            next(first)
        with loader(state=first.state) as second:
            for size in SIZES[4:]:
                batch = next(second)
                assert len(batch["tokens"]) == size
                np.testing.assert_array_equal(batch["tokens"], next(first)["tokens"])


@pytest.mark.parametrize("first", [0, 3, 8, 16])
def test_a_first_batch_that_does_not_double_to_the_last_is_refused(first):
    with pytest.raises(UserError, match=r"data.first_batch = \d+: doubled .*global_batch = 8; use one of \[4, 2, 1\]"):
        BatchGrowth(first, 8, 12)


def test_a_config_needs_both_numbers(tmp_path):
    refused = train(tmp_path, "data.first_batch=4")
    assert refused.code == 2
    assert "data.growth_rows\n    rule: a batch that grows needs it, since data.first_batch is set" in refused.err
    refused = train(tmp_path, "data.first_batch=2", "data.growth_rows=8")
    assert "data.first_batch = 2\n    rule: the rules split 'batch' over fsdp 4" in refused.err


def test_a_run_grows_its_batch_and_resumes(tmp_path):
    grows = ("data.first_batch=4", "data.growth_rows=16", "run.steps=6")
    run = fit(tmp_path / "whole", *grows)
    by_hand = hand_written(run)
    np.testing.assert_allclose(losses(run.directory), by_hand, rtol=1e-6)
    assert run.loop.batches.state["next_row"] == 4 * 4 + 2 * 8
    fit(tmp_path / "run", *grows, stop_after=3)
    fit(tmp_path / "run", *grows)
    assert losses(tmp_path / "run") == losses(run.directory)
    rates = [(row["tokens_per_s"] * row["step_time_s"]) for row in metrics(run.directory)]
    np.testing.assert_allclose(rates, [4 * 16] * 4 + [8 * 16] * 2)


def test_the_program_of_an_earlier_size_is_dropped():
    alive, seen = weakref.WeakSet(), []

    class Program:
        def __init__(self):
            alive.add(self)

        def __call__(self, state, batch):
            seen.append((len(alive), len(batch["tokens"])))
            return state, {"loss": 1.0, "skipped": 0, "skipped_in_row": 0}

    loop = trainer(len(SIZES))
    loop.train_step = SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=Program))
    with loop.batches, loader() as loop.batches:
        loop.fit()
    assert seen == [(1, size) for size in SIZES]


def hand_written(run: Trainer) -> list[float]:
    """The losses of a loop over the same rows, with batches of 4 and then of 8 cut by hand."""
    job, data = run.job, run.job.config.data
    source = run.loop.batches._source
    state, step, found = job.init_state(), job.train_step(), []
    for size, first in [(4, 0), (4, 4), (4, 8), (4, 12), (8, 16), (8, 24)]:
        at = {"epoch": 0, "next_row": first, "fingerprint": source.fingerprint}
        options = {"seed": 0, "sharding": job.batch_sharding, "shuffle": data.shuffle}
        with Loader(source, global_batch=size, state=at, **options) as batches:
            state, values = step(state, next(batches))
        found.append(float(values["loss"]))
    return found
