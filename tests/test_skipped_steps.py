"""Steps that change no weight: non-finite ones, and batches without a target."""

import logging

import numpy as np
import pytest
from loops import abstract, trainer

import tiny
from shardtrain.checkpoint import Checkpointer, verify
from shardtrain.data import SyntheticTokens
from shardtrain.errors import UserError


class Spoilt(SyntheticTokens):
    """In the batches of some steps all targets have another weight: NaN, or 0."""

    def __init__(self, steps, weight):
        super().__init__(seq_len=tiny.LENGTH, vocab_size=64, seed=0)
        self._spoilt, self._weight = steps, weight

    def __getitem__(self, row):
        content = super().__getitem__(row)
        if row // 8 + 1 in self._spoilt:
            content["loss_mask"] = np.full_like(content["loss_mask"], self._weight)
        return content


def fit(directory, steps, **options):
    """Train, or go on, with NaN in some steps; the loop and the steps that were not finite."""
    with Checkpointer(directory, keep=99) as checkpointer:
        restored = checkpointer.restore(abstract())
        source = Spoilt(steps, np.nan)
        options = {"max_skipped": 3, "checkpointer": checkpointer, "checkpoint_every": 1, **options}
        loop = trainer(8, restored, source, **options)
        with loop.batches:
            loop.fit()
    return loop


def saved(directory):
    return [record.step for record in verify(directory)]


def test_no_checkpoint_lies_amid_steps_that_are_not_finite(tmp_path, caplog):
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 6 .*; the checkpoint of step 3 is intact"):
        fit(tmp_path, [4, 5, 6, 7])
    assert saved(tmp_path) == [1, 2, 3]
    assert "step 5 is not saved: 2 steps in a row were not finite" in caplog.text
    loop = fit(tmp_path, [4, 5])  # repaired, as far as it must be
    assert (loop.step, int(loop.state.skipped)) == (8, 2)
    assert saved(tmp_path) == [1, 2, 3, 6, 7, 8]


def test_a_run_that_was_stopped_amid_them_has_the_whole_allowance_again(tmp_path):
    loop = fit(tmp_path, [4, 5, 6, 7], should_stop=lambda step: step == 5)
    assert loop.stopped_early
    assert saved(tmp_path) == [1, 2, 3, 5]
    loop = fit(tmp_path, [6, 7])
    assert (loop.step, int(loop.state.skipped)) == (8, 4)


def test_a_stop_amid_them_is_no_way_around_the_limit(tmp_path):
    fit(tmp_path, [4, 5], should_stop=lambda step: step == 5)
    with pytest.raises(UserError, match="up to step 8"):
        fit(tmp_path, [6, 7, 8])


def test_the_end_of_a_run_is_saved_as_it_is(tmp_path):
    assert fit(tmp_path, [8]).step == 8
    assert saved(tmp_path)[-1] == 8


def test_a_batch_without_a_target_is_told_and_training_goes_on(caplog):
    caplog.set_level(logging.WARNING)
    loop = trainer(6, source=Spoilt([2, 4], 0.0))
    with loop.batches:
        loop.fit()
    assert loop.step == 6
    said = [record.getMessage() for record in caplog.records if "learn from" in record.getMessage()]
    assert said == [
        "the batch of step 2 has no target to learn from: all are masked; going on",
        "2 steps had a batch without a target to learn from",
    ]
