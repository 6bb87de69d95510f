"""A step as it is called: what JAX would say in its words, or crash on, is said in ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_eval_step, make_train_step

TX = optax.sgd(0.1)


@pytest.fixture(scope="module")
def parts():
    """Place, model, the step, and the same step compiled as the training loop does it."""
    place, model = tiny.partitioner(fsdp=2), tiny.llama(n_layers=1)
    step = make_train_step(model, TX, place)
    return place, model, step, step.lower(abstract_state(model, TX, place), tiny.batch(place)).compile()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_that_was_given_away_is_refused(parts, compiled):
    place, model, *steps = parts
    state = init_state(model, TX, place)
    new, _ = steps[compiled](state, tiny.batch(place))
    with pytest.raises(
        UserError, match=r"passed to a train step before, which donated its memory .*state that the step"
    ):
        steps[compiled](state, tiny.batch(place))
    with pytest.raises(UserError, match="passed to a train step before"):
        make_eval_step(model, place)(state, tiny.batch(place))
    steps[compiled](new, tiny.batch(place))


@pytest.mark.parametrize("compiled", [False, True])
def test_arguments_on_other_devices_are_refused(parts, compiled):
    place, model, *steps = parts
    batch = {name: jax.device_put(a, jax.devices()[5]) for name, a in tiny.batch().items()}
    with pytest.raises(UserError, match=r"batch\S* is on cpu:5, but the step runs on a mesh of cpu:0, cpu:1; make"):
        steps[compiled](init_state(model, TX, place), batch)
    elsewhere = init_state(model, TX, tiny.partitioner())
    with pytest.raises(UserError, match=r"state\S* is on cpu:0, but the step runs on a mesh of cpu:0, cpu:1"):
        steps[compiled](elsewhere, tiny.batch(place))


def test_a_mistake_within_another_trace_is_explained_too(parts):
    place, model, step, _ = parts
    with pytest.raises(UserError, match="the model reads 'tokens' from the batch"):
        jax.jit(step)(init_state(model, TX, place), {"positions": tiny.batch(place)["positions"]})


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("leaf", ["tokens", "positions", "targets"])
def test_a_batch_that_lacks_what_the_model_reads_is_refused(pipe, leaf):
    place = tiny.partitioner(pipe=pipe)
    table = schedules.make("1f1b", 2, 4) if pipe > 1 else None
    model = ModelDef(lambda rngs: Llama(**tiny.SIZES, rngs=rngs), schedule=table)
    batch = {name: a for name, a in tiny.batch().items() if name != leaf}
    for step in (make_train_step(model, TX, place), make_eval_step(model, place)):
        with pytest.raises(UserError, match=f"the model reads '{leaf}' from the batch, which has only loss_mask, "):
            step.lower(abstract_state(model, TX, place), batch)


def test_a_key_error_of_the_users_own_stays_what_it_is(parts):
    place, model, *_ = parts

    def loss(module, batch, ctx):
        options = {"width": 3}
        return batch["tokens"].sum() * options["positions"], jnp.ones(()), {}

    with pytest.raises(KeyError, match="positions"):
        make_train_step(model, TX, place, loss=loss).lower(abstract_state(model, TX, place), tiny.batch(place))


def test_a_compiled_step_names_the_leaves_that_differ(parts):
    place, model, _, compiled = parts
    batch = {name: a for name, a in tiny.batch(place).items() if name != "row"}
    with pytest.raises(UserError, match=r"compiled for a batch of .*row.* and was given one of"):
        compiled(init_state(model, TX, place), batch)


BATCHES = {
    "nothing": (None, "the batch is None, but a batch is a dict"),
    "an array": (np.ones((16, 16)), r"the batch is float\d+\[16, 16\], but a batch is a dict"),
    "empty": ({}, "but a batch is a dict of"),
    "a number in it": ({"tokens": np.int32(3)}, r"batch\['tokens'\] is int32\[\], but a batch"),
    "other rows": (
        {"tokens": np.ones((16, 16), "i4"), "targets": np.ones((8, 16), "i4")},
        "one row per example, but here they have {'targets': 8, 'tokens': 16} rows",
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_what_is_no_batch(parts, case):
    place, model, step, _ = parts
    batch, message = BATCHES[case]
    with pytest.raises(UserError, match=message):
        step(init_state(model, TX, place), batch)


def test_what_is_no_state(parts):
    place, model, step, _ = parts
    with pytest.raises(UserError, match="the state is a dict, but must be a TrainState; make one with init_state"):
        step(init_state(model, TX, place).params, tiny.batch(place))


@pytest.mark.parametrize("pipe", [1, 2])
def test_a_sequence_that_context_does_not_divide_is_refused(pipe):
    place = tiny.partitioner(pipe=pipe, context=2)
    table = schedules.make("1f1b", 2, 4) if pipe > 1 else None
    model = ModelDef(lambda rngs: Llama(**tiny.SIZES, rngs=rngs), schedule=table)
    with pytest.raises(UserError, match=r"batch\['\w+'\]: dim 1 = 15: the rules split 'seq' over context 2"):
        make_train_step(model, TX, place).lower(abstract_state(model, TX, place), tiny.batch(length=15))


def test_a_step_has_the_attributes_of_what_is_within(parts):
    place, model, step, compiled = parts
    assert "HloModule" in compiled.as_text()
    assert compiled.memory_analysis().alias_size_in_bytes > 0
    assert "stablehlo" in step.lower(abstract_state(model, TX, place), tiny.batch(place)).as_text()
    assert jax.eval_shape(step, abstract_state(model, TX, place), tiny.batch(place))[1]["loss"].dtype == jnp.float32
