"""Weights gathered once per step: the single-device gradients, with one gather and one scatter over fsdp each."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from test_backward_modes import case, make, wanted

import tiny
from shardtrain.collectives.fsdp import gathered_bytes
from shardtrain.errors import UserError
from shardtrain.hlo import collectives
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.pipeline import schedules
from shardtrain.sharding import use
from shardtrain.train.gradients import Gradients
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_train_step
from shardtrain.weights.paths import flatten

#: With a second axis, uneven layers, auxiliary terms and tied embeddings.
QUICK = [case("interleaved 4 2", "save", "pipe2 fsdp2 tensor2", "tied", 6)]
FULL = [
    case("1f1b 4 1", "remat", "pipe4 fsdp2", "tied", 6),
    case("zb_h1 4 1", "split", "pipe2 data2 fsdp2", "tied", 6),
    *(
        case(f"{schedule} {chunks}", backward, mesh, kind, int(mesh[4]) * chunks + 1)
        for mesh, kind in (("pipe2 data2 fsdp2", "tied"), ("pipe2 fsdp2 tensor2", "llama"), ("pipe4 fsdp2", "llama"))
        for schedule, chunks, backward in (
            ("1f1b 4", 1, "remat"),
            ("1f1b 2", 1, "save"),
            ("interleaved 4", 2, "remat"),
            ("interleaved 8", 2, "save"),
            ("zb_h1 2", 1, "split"),
            ("zb_v 4", 2, "split"),
        )
    ),
    case("gpipe 2 1", "remat", "pipe2 fsdp4", "llama", 3),
    case("1f1b 4 1", "remat", "pipe2 island2 fsdp2", "llama", 3),
    case("1f1b 4 1", "save", "pipe2 fsdp2 expert2", "tied", 3),
    case("zb_h1 4 1", "split", "pipe2 fsdp2 context2", "llama", 3),
]


@pytest.mark.parametrize(
    ("schedule", "backward", "mesh", "kind", "n_layers", "remat"),
    [*QUICK, *(pytest.param(*p.values, id=p.id, marks=pytest.mark.full) for p in FULL)],
)
def test_gradients_are_the_single_device_ones_and_cross_fsdp_once(schedule, backward, mesh, kind, n_layers, remat):
    sizes = {word[:-1]: int(word[-1]) for word in mesh.split()}
    name, microbatches, chunks = schedule.split()
    table = schedules.make(name, sizes["pipe"], int(microbatches), int(chunks))
    mode = {} if backward == "split" else {"backward": backward}
    with jax.enable_x64(True):
        model, place = ModelDef(make(kind, n_layers, remat), schedule=table, **mode), tiny.partitioner(**sizes)
        state, batch = init_state(model, optax.sgd(0.1), place, seed=3), tiny.batch(place, rows=32)
        program = jax.jit(partial(gradients, model, place, jnp.float64)).lower(state, batch).compile()
        sums, grads = jax.tree.map(np.asarray, program(state, batch))
        assert tiny.relative_error((sums, model.canonical(grads)), wanted(kind, n_layers, remat)) < 1e-12
    found = [c for c in collectives(program.as_text(), place.mesh) if "fsdp" in c.axes]
    assert all(c.loops == () for c in found), "fsdp in a loop"
    check_shapes(found, model, place)
    check_bytes(found, model, place)


def gradients(model, place, dtype, state, batch):
    with use(place):
        key = jax.random.key(7)
        grads, sums, _ = Gradients(model, place, reduce_dtype=dtype, gather="step")(state, batch, key)
        return sums, grads


def check_shapes(found, model, place):
    """A gather and a scatter for each weight that fsdp splits, over fsdp alone; for others one sum; nothing else."""
    weights = flatten(model.weights).values()
    of = {"all-gather": [], "reduce-scatter": [], "all-reduce": []}
    for weight in weights:
        whole, part = (place.sharding(weight.axes, drop=drop).shard_shape(weight.shape) for drop in (["fsdp"], []))
        if whole == part:
            of["all-reduce"].append(whole)
        else:
            of["all-gather"].append(whole)
            of["reduce-scatter"].append(part)
    for kind, shapes in of.items():
        assert Counter(s for c in found if c.kind == kind for s in c.shapes if s) == Counter(shapes), kind
    assert {c.kind for c in found} == {*of}
    assert all(c.axes == {"fsdp"} for c in found if c.kind != "all-reduce")


def check_bytes(found, model, place):
    """What is reported is what was gathered, and what was reduced."""
    results = [a.bytes for c in found if c.kind == "all-gather" for a in c.results]
    reduced = [a.bytes for c in found if c.kind != "all-gather" for a in c.operands if a.shape]
    held = gathered_bytes(model.weights, place)
    assert (held.weights, held.gradients) == (sum(results), sum(reduced))


def collected(jaxpr, name):
    """All equations of a primitive, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from collected(inner, name)


def llama(mesh=None, **options):
    precision = Precision(jnp.float32, jnp.bfloat16, jnp.float32)
    schedule = mesh and schedules.make("1f1b", mesh["pipe"], 4)
    return ModelDef(lambda rngs: Llama(**{**tiny.SIZES, **options}, precision=precision, rngs=rngs), schedule=schedule)


def test_weights_travel_as_they_are_computed_with_and_gradients_in_float32():
    """Read off the traced program: XLA's CPU backend widens bfloat16 again."""
    mesh = {"pipe": 2, "data": 2, "fsdp": 2}
    model, place = llama(mesh), tiny.partitioner(**mesh)
    state = abstract_state(model, optax.sgd(0.1), place)
    program = jax.make_jaxpr(partial(gradients, model, place, jnp.float32))(state, tiny.batch(place))
    gathers, scatters = (list(collected(program.jaxpr, name)) for name in ("all_gather", "reduce_scatter"))
    assert len(gathers) == len(scatters) == 9  # seven matrices, the embedding and the head
    assert {str(eqn.outvars[0].aval.dtype) for eqn in gathers} == {"bfloat16"}
    assert {str(eqn.invars[0].aval.dtype) for eqn in scatters} == {"float32"}
    assert {str(g.dtype) for g in program.out_avals} == {"float32"}


@pytest.mark.parametrize(
    ("mesh", "rules", "words"),
    [
        ({"pipe": 2, "data": 2}, {}, "mesh.fsdp is 1"),
        ({"pipe": 2, "fsdp": 2}, {"batch": ["data"]}, r"rules.batch \('data',\) does not split them over fsdp"),
        ({"pipe": 2, "fsdp": 2}, {"embed": None}, "no weight is split over fsdp"),
        (
            {"pipe": 2, "fsdp": 2, "tensor": 2},
            {"vocab": ["tensor", "fsdp"], "embed": None},
            r"weight embedding.weight has tensor x fsdp on dim 0 \('vocab'\)",
        ),
    ],
)
def test_what_cannot_be_gathered_once_is_refused_before_anything_compiles(mesh, rules, words):
    with pytest.raises(UserError, match=words):
        make_train_step(llama(mesh), optax.sgd(0.1), tiny.partitioner(rules, **mesh), gather="step")


def test_gathering_once_per_step_is_for_pipelines():
    with pytest.raises(UserError, match="the model has no schedule"):
        make_train_step(llama(), optax.sgd(0.1), tiny.partitioner(fsdp=2), gather="step")
