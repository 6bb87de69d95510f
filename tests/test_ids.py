"""Debug: ids that no table has a row for are refused before the step, on every mesh."""

import jax
import numpy as np
import optax
import pytest

import tiny
from shardtrain import build, load_config, nn
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.pipeline import schedules
from shardtrain.train.ids import IdCheck
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import init_state
from shardtrain.train.step import make_eval_step, make_train_step

TX = optax.sgd(0.1)


class Learned(Llama):
    """A Llama with learned positions too."""

    def __init__(self, rngs):
        super().__init__(**{**tiny.SIZES, "n_layers": 4}, rngs=rngs)
        self.position = nn.PositionEmbedding(16, 32, rngs=rngs)

    def embedder(self, batch, ctx):
        return super().embedder(batch, ctx) + self.position(batch["positions"])


def batch(place, leaf=None, value=0):
    """A batch in which one id, in row 5 at position 3, is `value`."""
    host = {name: np.array(a) for name, a in tiny.batch().items()}
    if leaf is not None:
        host[leaf][5, 3] = value
    return tiny.placed(host, place)


BAD = {
    ("tokens", 64): "vocabulary has 64: ids are 0 to 63; correct",
    ("tokens", -1): "vocabulary has 64: ids are 0 to 63; correct",
    ("targets", 64): "vocabulary has 64: ids are 0 to 63, or negative for a target that is ignored",
    ("positions", 16): "position table has 16: ids are 0 to 15",
}


@pytest.mark.parametrize("mesh", [{}, {"pipe": 2, "data": 2}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_an_id_out_of_range_is_named_with_its_place(mesh):
    place = tiny.partitioner(**mesh)
    model = ModelDef(Learned, schedule=schedules.make("1f1b", 2, 8) if "pipe" in mesh else None)
    check = IdCheck(model)
    for (leaf, value), rule in BAD.items():
        with pytest.raises(UserError, match=rf"batch\['{leaf}'\] holds {value} in row 5, at 3, but the model's {rule}"):
            check(batch(place, leaf, value))
    for leaf, value in {"tokens": 63, "targets": -100, "positions": 15}.items():
        check(batch(place, leaf, value))


def test_a_step_with_debug_refuses_before_it_runs():
    place, model = tiny.partitioner(data=2), tiny.llama(n_layers=1)
    state, good, bad = init_state(model, TX, place), batch(place), batch(place, "tokens", 99)
    step = make_train_step(model, TX, place, debug=True)
    for run in (step, step.lower(state, good).compile(), make_eval_step(model, place, debug=True)):
        with pytest.raises(UserError, match="holds 99 in row 5"):
            run(state, bad)
    with pytest.raises(UserError, match=r"not known within another jax.jit; call the step outside"):
        jax.jit(lambda state, batch: step(state, batch)[1])(state, good)
    step(state, good)


def test_a_model_without_a_known_table_has_nothing_to_debug():
    class Plain(nn.RMSNorm):
        def __init__(self, rngs):
            super().__init__(4, rngs=rngs)

    with pytest.raises(UserError, match="debug compares ids with weights of a logical axis 'vocab'"):
        make_train_step(ModelDef(Plain), TX, tiny.partitioner(), loss=lambda *_: None, debug=True)


def test_a_config_asks_for_it():
    text = "tests/small.yaml"
    job = build(load_config(text, ["run.debug=true"]))
    state = job.init_state()
    length = job.config.data.seq_len
    host = dict(tiny.batch(rows=job.config.data.global_batch, length=length))
    host["tokens"] = np.full_like(host["tokens"], 10**6)
    for step in (job.train_step(), job.eval_step()):
        with pytest.raises(UserError, match=r"batch\['tokens'\] holds 1000000 in row 0, at 0"):
            step(state, host)
