"""A step is saved before it is evaluated, and an evaluation that did not end is made when the run goes on."""

import pytest

from commands import CONFIG, compiled_once, fit, load_config, metrics, saved  # noqa: F401
from shardtrain import Callback
from shardtrain.run import Trainer

OPTIONS = ("eval.every=4", "eval.batches=3", "checkpoint.every=4")
TIMES = {"step_time_s", "tokens_per_s", "memory_bytes"}


def start(directory, **options):
    return Trainer.from_config(load_config(CONFIG, [f"run.dir={directory}", *OPTIONS]), **options)


def rows(directory):
    """The lines, without what is measured."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in metrics(directory)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return rows(fit(tmp_path_factory.mktemp("undisturbed") / "run", *OPTIONS).directory)


class Polls:
    """Asks to stop at the n-th poll at a step."""

    def __init__(self, step, poll):
        self.seen, self.step, self.poll = [], step, poll

    def __call__(self, step):
        self.seen.append(step)
        return step == self.step and self.seen.count(step) == self.poll


@pytest.mark.parametrize("poll", [1, 2, 4])
@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.full), 12])
def test_a_stop_ends_an_evaluation_at_its_next_batch(undisturbed, tmp_path, step, poll):
    """At poll 1 it has not begun; polls 2, 3 and 4 come before its three batches."""
    polls = Polls(step, poll)
    run = start(tmp_path / "run", should_stop=polls)
    run.fit()
    assert run.stopped_early
    assert polls.seen.count(step) == poll
    assert saved(tmp_path / "run")[-1] == step
    before = rows(tmp_path / "run")
    assert len(before) == step
    assert "eval_loss" not in before[-1]
    fit(tmp_path / "run", *OPTIONS)
    assert rows(tmp_path / "run") == undisturbed
    evaluated = [row["step"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert evaluated == [4, 8, 12]


def test_an_evaluation_that_was_made_is_not_made_again(undisturbed, tmp_path):
    class Counts(Callback):
        steps: tuple[int, ...] = ()

        def on_eval(self, step, state):
            self.steps += (step,)
            return {}

    run = start(tmp_path / "run", should_stop=lambda step: step == 5)
    run.fit()
    counts = Counts()
    start(tmp_path / "run", callbacks=[counts]).fit()
    assert counts.steps == (8, 12)
    assert rows(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("step", [4, 12])
def test_what_dies_in_an_evaluation_has_saved_before(undisturbed, tmp_path, step):
    class Dies(Callback):
        def on_eval(self, at, state):
            if at == step:
                raise RuntimeError("died")
            return {}

    with pytest.raises(RuntimeError, match="died"):
        start(tmp_path / "run", callbacks=[Dies()]).fit()
    assert saved(tmp_path / "run")[-1] == step
    assert len(rows(tmp_path / "run")) == step - 1, "its line is in the checkpoint"
    fit(tmp_path / "run", *OPTIONS)
    assert rows(tmp_path / "run") == undisturbed
