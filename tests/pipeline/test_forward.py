"""Evaluation and generation through a pipeline: the numbers of an unpipelined model, each rank with its own layers."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_backward_modes import F64, Tied, make, v_shaped

import tiny
from helpers import equations
from shardtrain.errors import UserError
from shardtrain.hlo import collectives
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.pipeline import schedules
from shardtrain.sharding import use
from shardtrain.train.generate import generate
from shardtrain.train.model_def import ModelDef
from shardtrain.train.next_token import NextToken
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_eval_step
from shardtrain.train.unpipelined import UnpipelinedModel


def sizes_of(words):
    """`pipe2 data4` as a mesh."""
    return {word[:-1]: int(word[-1]) for word in words.split()}


def table(schedule, ranks):
    """`name microbatches chunks`."""
    name, microbatches, chunks = schedule.split()
    if name == "v":
        return v_shaped(ranks, int(microbatches))
    return schedules.make(name, ranks, int(microbatches), int(chunks))


def sums(place, model):
    state = init_state(model, optax.sgd(0.1), place, seed=3)
    return jax.tree.map(np.asarray, make_eval_step(model, place)(state, tiny.batch(place, rows=32)))


@cache
def wanted(kind, n_layers):
    with jax.enable_x64(True):
        return sums(tiny.partitioner(), ModelDef(make(kind, n_layers, "full")))


QUICK = [
    # Tied weights, auxiliary terms, uneven layers; 8 rows a device, of which three microbatches become two.
    ("zb_v 3 2", "pipe2 data2 fsdp2", "tied", 5),
    ("interleaved 4 2", "pipe4 tensor2", "llama", 9),
]


def everything():
    meshes = ["pipe2 context2 tensor2", "pipe4", "pipe8", "pipe4 data2", "pipe2 island2 data2", "pipe2 fsdp2 tensor2"]
    names = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 2), ("v", 2)]
    turns = itertools.cycle(itertools.product((2, 8), ("tied", "llama")))
    for ((name, chunks), mesh), (microbatches, kind) in zip(itertools.product(names, meshes), turns, strict=False):
        yield pytest.param(
            f"{name} {microbatches} {chunks}", mesh, kind, int(mesh[4]) * chunks + 1, marks=pytest.mark.full
        )


@pytest.mark.parametrize(("schedule", "mesh", "kind", "n_layers"), [*QUICK, *everything()])
def test_evaluation_sums_equal_the_single_device_ones(schedule, mesh, kind, n_layers):
    sizes = sizes_of(mesh)
    with jax.enable_x64(True):
        model = ModelDef(make(kind, n_layers, "full"), schedule=table(schedule, sizes["pipe"]))
        got, want = sums(tiny.partitioner(**sizes), model), wanted(kind, n_layers)
        assert got.keys() == want.keys()
        assert tiny.relative_error(got, want) < 1e-12


@pytest.mark.parametrize(("rows", "ticks"), [(32, 2 * 2 + 2), (6, 2 * 3 + 2), (5, 2 * 1 + 2)])
@pytest.mark.usefixtures("x64")
def test_rows_that_microbatches_do_not_divide_go_in_the_most_that_do(rows, ticks):
    place, model = tiny.partitioner(pipe=2), ModelDef(make("tied", 4, "full"), schedule=table("zb_v 3 2", 2))
    state = abstract_state(model, optax.sgd(0.1), place)
    loops = [
        e for e in equations(make_eval_step(model, place), state, tiny.batch(rows=rows)) if str(e.primitive) == "scan"
    ]
    assert ticks in {loop.params["length"] for loop in loops}


@pytest.mark.usefixtures("x64")
def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    place, model = tiny.partitioner(pipe=2, data=2), ModelDef(make("llama", 2, "full"), schedule=table("1f1b 4 1", 2))
    state = abstract_state(model, optax.sgd(0.1), place)
    with pytest.raises(UserError, match=r"batch\['\w+'\]: dim 0 = 7: the rules split 'batch' over data 2, which"):
        make_eval_step(model, place).lower(state, tiny.batch(rows=7))


@pytest.mark.usefixtures("x64")
def test_a_schedule_without_a_backward_pass_is_refused_for_a_model():
    alone = schedules.forward(schedules.make("1f1b", 2, 4))
    with pytest.raises(UserError, match="1f1b, forward goes forward only"):
        ModelDef(make("llama", 2, "full"), schedule=alone)


def tokens(mesh, schedule=None, **options):
    """Greedy and sampled continuations that outgrow the window."""
    sizes = sizes_of(mesh)
    place, sizes = tiny.partitioner(**sizes), {**tiny.SIZES, "tie_embeddings": True, **options}
    model = ModelDef(
        lambda rngs: Llama(**sizes, precision=F64, rngs=rngs),
        schedule=schedule and table(schedule, place.mesh.shape["pipe"]),
    )
    state = init_state(model, optax.sgd(0.1), place, seed=3)
    write = lambda t: generate(model, state, place, [5, 9, 2], tokens=8, window=8, temperature=t, seed=1)  # noqa: E731
    return write(0.0), write(1.0)


@pytest.mark.parametrize(
    ("mesh", "schedule", "n_layers"),
    [
        pytest.param("pipe2 fsdp2", "1f1b 4 1", 3, marks=pytest.mark.full),
        pytest.param("pipe4 data2", "zb_v 2 2", 9, marks=pytest.mark.full),
        pytest.param("pipe2 data2 tensor2", "interleaved 3 2", 5, marks=pytest.mark.full),
    ],
)
@pytest.mark.usefixtures("x64")
def test_generated_tokens_equal_those_of_an_unpipelined_model(mesh, schedule, n_layers):
    got = tokens(mesh, schedule, n_layers=n_layers)
    want = tokens(mesh.split(maxsplit=1)[1], n_layers=n_layers)
    np.testing.assert_array_equal(got, want)
    greedy, sampled = got
    assert len({*greedy.ravel()}) > 2
    assert (sampled[0] != sampled[1]).any()


@pytest.mark.usefixtures("x64")
def test_a_model_without_logits_is_refused_before_anything_compiles():
    model = ModelDef(lambda rngs: Tied(2, "full", rngs), schedule=table("1f1b 4 1", 2))
    with pytest.raises(UserError, match=r"Tied has no method logits\(x\)"):
        generate(model, None, tiny.partitioner(pipe=2), [1], tokens=1, window=4)


#: 35 MB of layers, of which a rank holds a quarter (padded), beside stage inputs of 8 KiB; tied, and in uneven stages.
LARGE = {**tiny.SIZES, "n_layers": 9, "d_model": 256, "d_ff": 1024, "tie_embeddings": True}
MESH = "pipe4 fsdp2"


def compiled(step, microbatches, schedule="1f1b", chunks=1, **options):
    """A step `(model, place) -> jitted`, compiled for microbatches of one row, and the model."""
    place, options = tiny.partitioner(**sizes_of(MESH)), {**LARGE, **options}
    model = ModelDef(
        lambda rngs: Llama(**options, precision=Precision(*[jnp.float32] * 3), rngs=rngs),
        schedule=table(f"{schedule} {microbatches} {chunks}", 4),
    )
    batch = tiny.batch(place, rows=microbatches * place.shards("batch"), length=8)
    return step(model, place).lower(abstract_state(model, optax.sgd(0.1), place), batch).compile(), model, place


@cache
def evaluation(*args, **options):
    return compiled(make_eval_step, *args, **options)


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def layers(model) -> int:
    """Bytes of all layers, as one device holds them beside `fsdp` alone."""
    weights = jax.tree.leaves(model.canonical_weights["blocks"]["layer"])
    return sum(w.size * w.dtype.itemsize for w in weights) // 2


def test_no_device_ever_holds_all_layers():
    def whole(model, place):
        """Evaluation of the canonical layers, gathered first."""

        def step(state, batch):
            with use(place):
                return UnpipelinedModel(model).sums(model.canonical(state), batch, place)

        return jax.jit(step)

    program, model, _ = evaluation(8)
    assert temporaries(program) < layers(model) / 2
    assert temporaries(compiled(whole, 8)[0]) > layers(model)


def test_memory_and_program_do_not_grow_with_the_microbatches():
    few, many = evaluation(8)[0], evaluation(32)[0]
    assert abs(temporaries(many) - temporaries(few)) <= 0.01 * temporaries(few)
    few, many = (sum(" = " in line for line in program.as_text().splitlines()) for program in (few, many))
    assert many == few  # instructions


@pytest.mark.parametrize(
    ("schedule", "chunks", "n_layers"),
    [("1f1b", 1, 9), *(pytest.param(name, 2, 18, marks=pytest.mark.full) for name in ("interleaved", "zb_v"))],
)
def test_between_ranks_only_activations_move_once_per_tick_and_sums_at_the_end(schedule, chunks, n_layers):
    program, model, place = evaluation(8, schedule, chunks, n_layers=n_layers)
    assert temporaries(program) < layers(model)
    found = [c for c in collectives(program.as_text(), place.mesh) if "pipe" in c.axes]
    moves = [c for c in found if c.kind == "collective-permute"]
    assert {(c.shapes, len(c.loops)) for c in moves} == {(((1, 8, 256),), 1)}
    assert {(c.kind, c.loops) for c in found if c not in moves} == {("all-reduce", ())}
    assert {shape for c in found if c not in moves for shape in c.shapes} == {()}


@pytest.mark.parametrize("tokens", [8, 1], ids=["reading", "a token"])
def test_generation_moves_activations_and_the_logits_of_one_position(tokens):
    def step(model, place):
        programs = NextToken(model, place)

        def run(state, batch):
            text, lengths = batch["tokens"], jnp.full(len(batch["tokens"]), 3, jnp.int32)
            logits, cache = programs.read(state.params, {}, text, lengths, keep=True)
            return (logits, cache) if tokens > 1 else programs.step(state.params, {}, cache, text[:, 0], lengths)

        return jax.jit(run)

    program, model, place = compiled(step, 1)
    assert temporaries(program) < layers(model) / 2
    found = [c for c in collectives(program.as_text(), place.mesh) if "pipe" in c.axes]
    moves = {((1, length, 256),) for length in {8, tokens}}
    assert {(c.kind, c.shapes) for c in found} == {
        *(("collective-permute", shapes) for shapes in moves),
        ("all-reduce", ((1, tiny.SIZES["vocab_size"]),)),
    }
