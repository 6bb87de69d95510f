"""What a model is made from: every mistake is named before anything is traced."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import tiny
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_eval_step, make_train_step


def make(rngs: nnx.Rngs) -> Llama:
    return Llama(**{**tiny.SIZES, "n_layers": 4}, rngs=rngs)


BUILDERS = {
    "a module": (
        lambda: make(nnx.Rngs(0)),
        r"was given a Llama, but takes a function from nnx.Rngs to a module",
    ),
    "nothing": (lambda: None, "was given None, but takes"),
    "a class with options": (lambda: Llama, r"calls Llama with nnx.Rngs alone.*ModelDef\(lambda rngs: MyModel"),
    "a function of nothing": (lambda: lambda: make(nnx.Rngs(0)), "calls <lambda> with nnx.Rngs alone"),
    "a function to a number": (lambda: lambda rngs: 3, "what <lambda> returned to ModelDef is 3, but must be a Module"),
}


@pytest.mark.parametrize("case", BUILDERS)
def test_what_model_def_is_given(case):
    given, message = BUILDERS[case]
    with pytest.raises(UserError, match=message):
        ModelDef(given())


def test_options_of_a_pipeline():
    table = schedules.make("zb_h1", 2, 2)
    with pytest.raises(UserError, match=r"backward = save: zb_h1 splits the backward pass, .* drop pipeline.backward"):
        ModelDef(make, schedule=table, backward="save")
    with pytest.raises(UserError, match=r"backward = sav: there is no such way .*; did you mean save"):
        ModelDef(make, schedule=table, backward="sav")
    with pytest.raises(UserError, match=r"pipeline.idle = skp: .*; did you mean skip"):
        ModelDef(make, schedule=table, idle="skp")
    with pytest.raises(UserError, match="schedule is '1f1b', but must be a Schedule; make one with"):
        ModelDef(make, schedule="1f1b")


@pytest.mark.parametrize(
    ("ranks", "mesh", "message"),
    [
        (2, {}, "1f1b is for 2 ranks, but the mesh axis pipe is 1"),
        (2, {"pipe": 4}, "1f1b is for 2 ranks, but the mesh axis pipe is 4"),
    ],
)
def test_the_ranks_of_a_schedule_are_those_of_the_mesh(ranks, mesh, message):
    model = ModelDef(make, schedule=schedules.make("1f1b", ranks, 2))
    place, tx = tiny.partitioner(**mesh), optax.sgd(0.1)
    for call in (init_state, make_train_step):
        with pytest.raises(UserError, match=message):
            call(model, tx, place)
    with pytest.raises(UserError, match=message):
        make_eval_step(model, place)


def test_what_init_state_and_the_steps_are_given():
    place, tx, module = tiny.partitioner(), optax.sgd(0.1), make(nnx.Rngs(0))
    model = ModelDef(make)
    for call in (init_state, make_train_step, abstract_state):
        with pytest.raises(UserError, match=r"model is a Llama, but must be a ModelDef; wrap the module: ModelDef\("):
            call(module, tx, place)
        with pytest.raises(UserError, match="tx is 'adamw', but must be a GradientTransformation"):
            call(model, "adamw", place)
        with pytest.raises(UserError, match="partitioner is a Mesh, but must be a Partitioner; make one"):
            call(model, tx, place.mesh)
    with pytest.raises(UserError, match="loss = 3: must be a function or None, not 3"):
        make_train_step(model, tx, place, loss=3)
    with pytest.raises(UserError, match=r"Plain does not follow nn.Model .*give make_train_step and"):
        make_eval_step(ModelDef(Plain), place)


class Plain(nnx.Module):
    """A plain Flax module with an annotation."""

    names: object = ("embed", "mlp")

    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.ones, type(self).names)
        self.a = nnx.Linear(4, 32, use_bias=False, kernel_init=init, rngs=rngs)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("fsdp", "tensor"), "weight a.kernel: 'fsdp' is a mesh axis; a tensor names logical axes, such as embed, mlp"),
        (
            jax.P(("data", "fsdp"), None),
            r"weight a.kernel has \('data', 'fsdp'\) among its axes.*one logical axis",
        ),
        (("embd", None), "weight a.kernel: logical axis 'embd' has no rule; did you mean embed"),
    ],
)
def test_mesh_axes_in_an_annotation(names, message):
    named = type("Named", (Plain,), {"names": names})
    with pytest.raises(UserError, match=message):
        abstract_state(ModelDef(named), optax.sgd(0.1), tiny.partitioner(fsdp=2, tensor=2))


def test_a_logical_axis_may_have_the_name_of_a_mesh_axis_if_a_rule_says_so():
    named = type("Named", (Plain,), {"names": ("fsdp", None)})
    place = tiny.partitioner(fsdp=2)
    place = type(place)(place.mesh, {**place.rules, "fsdp": ("fsdp",)})
    state = abstract_state(ModelDef(named), optax.sgd(0.1), place)
    assert state.params["a"]["kernel"].sharding.spec == jax.P("fsdp")
    assert state.step.dtype == jnp.int32
