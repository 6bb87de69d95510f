"""The loop: how many steps are in flight, what is reported when, what ends it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import first_state, parts, trainer

import tiny
from commands import assert_same_bits
from shardtrain.checkpoint import Checkpointer
from shardtrain.errors import UserError
from shardtrain.metrics import MetricsLog, read
from shardtrain.train.loop import Callback


class Recorder(Callback):
    def __init__(self):
        self.steps = []

    def on_step(self, step, metrics):
        self.steps.append((step, dict(metrics)))
        return {"double": 2 * metrics["loss"]}


class Screen:
    """Shows what it is given, until it is broken."""

    def __init__(self, breaks_at=None):
        self.shown, self.threads, self.breaks_at = [], set(), breaks_at

    def update(self, step, values):
        if step == self.breaks_at:
            raise OSError(5, "Input/output error")
        self.shown.append((step, values["loss"]))
        self.threads.add(threading.current_thread())

    def message(self, text):
        assert threading.current_thread() is threading.main_thread()


def test_at_most_two_steps_are_in_flight_and_metrics_come_one_step_late():
    recorder = Recorder()
    loop = trainer(6, callbacks=[recorder])
    with loop.batches:
        state = loop.fit()
    in_flight = np.cumsum([1 if what == "sent" else -1 for what, _ in loop.train_step.diary])
    assert in_flight.max() == 2
    assert loop.train_step.diary[:4] == [("sent", 1), ("sent", 2), ("fetched", 1), ("sent", 3)]
    assert [step for step, _ in recorder.steps] == [1, 2, 3, 4, 5, 6]
    assert int(state.step) == 6
    values = recorder.steps[3][1]
    assert values["tokens_per_s"] == pytest.approx(8 * tiny.LENGTH / values["step_time_s"])
    assert values["mfu"] == pytest.approx(values["tokens_per_s"] * 1e6 / 1e12)


def test_it_stops_after_the_step_that_should_stop_names():
    loop = trainer(50, should_stop=lambda step: step == 3)
    with loop.batches:
        state = loop.fit()
    assert (int(state.step), loop.stopped_early) == (3, True)


def test_too_many_non_finite_steps_end_the_run():
    loop = trainer(50, max_skipped=3)
    loop.state.params["norm"]["scale"] = loop.state.params["norm"]["scale"] * np.nan
    with (
        loop.batches,
        pytest.raises(UserError, match=r"not finite for 3 steps in a row, up to step 3 .*lower optimizer.lr"),
    ):
        loop.fit()


def test_steps_are_shown_in_order_by_a_thread_that_does_not_train():
    screen = Screen()
    loop = trainer(5)
    with loop.batches:
        loop.fit(screen)
    assert [step for step, _ in screen.shown] == [1, 2, 3, 4, 5]
    assert threading.main_thread() not in screen.threads
    assert not any(thread.is_alive() for thread in screen.threads)


def test_what_cannot_be_reported_ends_the_run():
    screen = Screen(breaks_at=2)
    loop = trainer(1000)
    with loop.batches, pytest.raises(OSError, match="Input/output error"):
        loop.fit(screen)
    assert [step for step, _ in screen.shown] == [1]
    assert loop.step < 1000


def test_the_lines_up_to_a_step_are_written_before_it_is_saved(tmp_path):
    written = []

    class Watched(Checkpointer):
        def save(self, step, state, extra):
            written.append((step, [row["step"] for row in read(tmp_path)]))
            super().save(step, state, extra)

    with MetricsLog(tmp_path) as log, Watched(tmp_path / "checkpoints") as checkpointer:
        loop = trainer(4, log=log, checkpointer=checkpointer, checkpoint_every=2)
        with loop.batches:
            loop.fit()
    assert written == [(2, [1, 2]), (4, [1, 2, 3, 4])]


class Reader(Callback):
    """Reads the state, and computes with it without reading."""

    def __init__(self, reads):
        self.reads, self.states, self.lines = reads, [], []

    def on_state(self, step, state):
        assert int(state.step) == step
        if self.reads:
            self.states.append(jax.device_get(state))
        return {"size": jnp.abs(state.params["norm"]["scale"]).sum()}

    def on_step(self, step, metrics):
        self.lines.append(metrics["size"])
        return {}


def test_a_callback_sees_the_state_that_each_step_makes():
    states, batches = [], trainer(1).batches
    state = first_state()
    with batches:
        for _, batch in zip(range(4), batches, strict=False):
            state, _ = parts().step(state, batch)
            states.append(jax.device_get(state))
    sizes = [np.abs(state.params["norm"]["scale"]).sum() for state in states]
    for reads in (True, False):
        reader = Reader(reads)
        loop = trainer(4, callbacks=[reader])
        with loop.batches:
            assert_same_bits(jax.device_get(loop.fit()), states[-1])
        np.testing.assert_allclose(reader.lines, sizes, rtol=1e-6)
        if reads:
            assert_same_bits(reader.states, states)


@pytest.mark.parametrize("hook", ["on_state", "on_step", "on_eval"])
def test_a_callback_cannot_replace_what_the_step_reports(hook):
    mine = Callback()
    setattr(mine, hook, lambda step, given: {"loss": 0.0})
    evaluation = {
        "eval_step": lambda state, batch: {"loss": (1.0, 1.0)},
        "eval_batches": lambda: [{"row": np.zeros(1)}],
    }
    loop = trainer(4, callbacks=[mine], **evaluation)
    with loop.batches, pytest.raises(UserError, match=f"Callback.{hook} returned loss, which the step has already"):
        loop.fit()
