"""The loop: how many steps are in flight, what is reported when, what ends it."""

import numpy as np
import pytest

import tiny
from shardtrain.data import Loader, SyntheticTokens
from shardtrain.errors import UserError
from shardtrain.optim import optimizer
from shardtrain.state import init_state
from shardtrain.step import make_train_step
from shardtrain.trainer import Callback, Speed, Trainer


class Watched:
    """A real step that keeps a diary of dispatches, and of metrics as the loop asks for them."""

    def __init__(self, step):
        self.step, self.diary, self.count = step, [], 0

    def lower(self, *args):
        self.step = self.step.lower(*args)
        return self

    def compile(self):
        self.step = self.step.compile()
        return self

    def __call__(self, state, batch):
        state, metrics = self.step(state, batch)
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


def trainer(steps: int, **options) -> Trainer:
    place, model = tiny.partitioner(fsdp=2), tiny.llama(n_layers=1)
    tx = optimizer("sgd", model.weights, lr=0.1)
    source = SyntheticTokens(seq_len=tiny.LENGTH, vocab_size=64, seed=0)
    batches = Loader(source, global_batch=8, seed=0, sharding=place.sharding(("batch", "seq")))
    step = Watched(make_train_step(model, tx, place))
    state = init_state(model, tx, place)
    return Trainer(state, step, batches, steps=steps, speed=Speed(8 * tiny.LENGTH, 1e6, 1e12), **options)


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
