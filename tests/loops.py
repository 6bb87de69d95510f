"""A loop around a tiny real step, compiled once for all tests of a file."""

from functools import cache
from types import SimpleNamespace

import jax
import numpy as np

import tiny
from shardtrain.checkpoint import Restored
from shardtrain.data import Loader, Source, SyntheticTokens
from shardtrain.models.mlp import MLP
from shardtrain.optim import optimizer
from shardtrain.train.loop import Loop
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import TrainState, abstract_state, init_state
from shardtrain.train.step import make_train_step
from shardtrain.train.step_timer import Speed


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
    del batch["segment_ids"]  # which the source does not have
    step = make_train_step(model, tx, place).lower(jax.device_put(state, shardings), batch).compile()
    return SimpleNamespace(place=place, source=source, state=state, shardings=shardings, step=step)


def abstract() -> TrainState:
    """What `parts().step` takes, to restore."""
    shared = parts()
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shared.state,
        shared.shardings,
    )


def first_state() -> TrainState:
    """A fresh state: the step donates it."""
    return jax.device_put(jax.tree.map(np.copy, parts().state), parts().shardings)


def trainer(steps: int, restored: Restored | None = None, source: Source | None = None, **options) -> Loop:
    """A loop of `parts().step`; of rows in order where a source of one's own is given."""
    shared = parts()
    batches = Loader(
        source or shared.source,
        global_batch=8,
        seed=0,
        sharding=shared.place.sharding(("batch", "seq")),
        shuffle=source is None,
        state=restored and restored.extra["data"],
    )
    state = restored.state if restored else first_state()
    return Loop(state, Watched(), batches, steps=steps, speed=Speed(8 * tiny.LENGTH, 1e6, 1e12), **options)
