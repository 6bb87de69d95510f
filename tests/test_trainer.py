"""The loop: how many steps are in flight, what is reported when, what ends it."""

import threading
from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import tiny
from shardtrain.checkpoint import Checkpointer
from shardtrain.data import Loader, SyntheticTokens
from shardtrain.errors import UserError
from shardtrain.metrics import MetricsLog, read
from shardtrain.model_def import ModelDef
from shardtrain.models.mlp import MLP
from shardtrain.optim import optimizer
from shardtrain.state import abstract_state, init_state
from shardtrain.step import make_train_step
from shardtrain.trainer import Callback, Loop, Speed


class Watched:
    """A real step that keeps a diary of dispatches, and of metrics as the loop asks for them."""

    def __init__(self):
        self.diary, self.count = [], 0

    def lower(self, state, batch):
        return self

    def compile(self):
        return self

    def __call__(self, state, batch):
        state, metrics = parts().step(state, batch)
        self.count += 1
        self.diary.append(("sent", self.count))
        return state, {name: Metric(value, self.diary, self.count) for name, value in metrics.items()}


class Metric:
    def __init__(self, value, diary, number):
        self.value, self.diary, self.number = value, diary, number

    def __float__(self):
        if ("fetched", self.number) not in self.diary:
            self.diary.append(("fetched", self.number))
        return float(self.value)


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


@cache
def parts() -> SimpleNamespace:
    """What all tests share: above all the step, compiled once."""
    place = tiny.partitioner(fsdp=2)
    model = ModelDef(lambda rngs: MLP(n_layers=1, d_model=8, d_ff=8, vocab_size=64, rngs=rngs))
    tx = optimizer("sgd", model.weights, lr=0.1)
    source = SyntheticTokens(seq_len=tiny.LENGTH, vocab_size=64, seed=0)
    state = jax.device_get(init_state(model, tx, place))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, tx, place))
    batch = tiny.batch(place, rows=8)
    step = make_train_step(model, tx, place).lower(jax.device_put(state, shardings), batch).compile()
    return SimpleNamespace(place=place, source=source, state=state, shardings=shardings, step=step)


def trainer(steps: int, **options) -> Loop:
    shared = parts()
    batches = Loader(shared.source, global_batch=8, seed=0, sharding=shared.place.sharding(("batch", "seq")))
    state = jax.device_put(jax.tree.map(np.copy, shared.state), shared.shardings)  # the step donates it
    return Loop(state, Watched(), batches, steps=steps, speed=Speed(8 * tiny.LENGTH, 1e6, 1e12), **options)


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
    loop = trainer(5, display=screen)
    with loop.batches:
        loop.fit()
    assert [step for step, _ in screen.shown] == [1, 2, 3, 4, 5]
    assert threading.main_thread() not in screen.threads
    assert not any(thread.is_alive() for thread in screen.threads)


def test_what_cannot_be_reported_ends_the_run():
    screen = Screen(breaks_at=2)
    loop = trainer(1000, display=screen)
    with loop.batches, pytest.raises(OSError, match="Input/output error"):
        loop.fit()
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
