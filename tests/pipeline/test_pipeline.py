"""A pipelined step is the single-device step, whatever the schedule; and what the compiler makes of it."""

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from shardtrain.errors import UserError
from shardtrain.hlo import Collective, collectives
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.pipeline.idle import UNIFORM
from shardtrain.pipeline.layers import layers_per_stage
from shardtrain.sharding import use
from shardtrain.train.gradients import Gradients
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_canonical, abstract_state, init_state
from shardtrain.train.step import make_eval_step, make_train_step
from shardtrain.weights.paths import flatten

OPTIONS = {"n_layers": 6, "dropout": 0.1, "z_loss": 1e-3}


def llama(mesh, schedule=None, dtype=jnp.float32, idle="compute", **options) -> ModelDef:
    table = schedules.make(schedule[0], mesh["pipe"], *schedule[1:]) if isinstance(schedule, tuple) else schedule
    precision = Precision(dtype, dtype, dtype)
    options = {**tiny.SIZES, **OPTIONS, **options}
    return ModelDef(lambda rngs: Llama(**options, precision=precision, rngs=rngs), schedule=table, idle=idle)


def gradients(mesh, schedule=None, **options):
    """Sums and canonical gradients of one float64 step."""
    place, model = tiny.partitioner(**mesh), llama(mesh, schedule, jnp.float64, **options)
    state = init_state(model, optax.sgd(0.1), place, seed=3)

    @jax.jit
    def run(state, batch):
        with use(place):
            key = jax.random.key(7)
            grads, sums, _ = Gradients(model, place, reduce_dtype=jnp.float64)(state, batch, key)
            return sums, model.canonical(grads)

    return jax.tree.map(np.asarray, run(state, tiny.batch(place)))


CASES = [
    ({"pipe": 2, "data": 2, "tensor": 2}, ("1f1b", 8, 1), {}),
    ({"pipe": 4, "fsdp": 2}, ("gpipe", 2, 1), {}),  # fewer microbatches than ranks, layers that do not divide
    ({"pipe": 2, "fsdp": 2, "tensor": 2}, ("interleaved", 4, 3), {}),
    ({"pipe": 4}, ("1f1b", 16, 1), {"tie_embeddings": True, "n_layers": 5}),
    ({"pipe": 8}, ("1f1b", 4, 1), {"n_layers": 9}),
    ({"pipe": 2, "island": 2, "data": 2}, ("1f1b", 4, 1), {"remat": "none"}),
    ({"pipe": 2, "context": 2, "tensor": 2}, ("1f1b", 4, 1), {"loss_chunk": 8}),
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "schedule", "options"),
    [pytest.param(*case, id=f"{case[0]} {case[1]}") for case in CASES],
)
def test_loss_and_gradients_equal_the_single_device_ones(mesh, schedule, options):
    with jax.enable_x64(True):
        assert tiny.relative_error(gradients(mesh, schedule, **options), gradients({}, **options)) < 1e-12


def irregular(name: str, microbatches: int, chunks: int) -> schedules.Schedule:
    """A schedule of two ranks that rests after every tick, so that its phases change all the time."""
    table = schedules.make(name, 2, microbatches, chunks)
    rests = np.full_like(table.table, -1)
    return dataclasses.replace(table, table=np.stack([table.table, rests], 1).reshape(-1, *table.table.shape[1:]))


@pytest.mark.full
@pytest.mark.parametrize(("name", "chunks"), [("zb_v", 2), ("1f1b", 1)])
def test_a_table_whose_phases_change_all_the_time_is_one_loop_and_no_other_maths(name, chunks):
    mesh = {"pipe": 2, "fsdp": 2, "tensor": 2}
    table = irregular(name, 4, chunks)
    with jax.enable_x64(True):
        assert tiny.relative_error(gradients(mesh, table), gradients({})) < 1e-12
    place, model = tiny.partitioner(**mesh), llama(mesh, table)
    step = make_train_step(model, optax.sgd(0.1), place)
    text = step.lower(abstract_state(model, optax.sgd(0.1), place), tiny.batch(place)).compile().as_text()
    branches = re.findall(r" conditional\(.*", text)
    assert len(branches) == len(table.phases) + 1  # and the guard against a gradient that is not finite
    assert all(f"/{UNIFORM}/cond" in branch for branch in branches)


@cache
def curve(pipelined: bool) -> list[float]:
    """Losses of 30 steps on changing batches, with everything that a step has; then the held-out loss."""
    mesh = {"pipe": 2, "data": 2, "fsdp": 2} if pipelined else {}
    place, model = tiny.partitioner(**mesh), llama(mesh, ("1f1b", 4, 1) if pipelined else None, n_layers=3)
    tx = optimizer("adamw", model.weights, lr=3e-3, clip_norm=1.0, weight_decay=0.1)
    state, step = init_state(model, tx, place, seed=1), make_train_step(model, tx, place, seed=5)
    losses = []
    for i in range(30):
        state, metrics = step(state, tiny.batch(place, seed=i % 5))
        losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
    total, weight = make_eval_step(model, place)(state, tiny.batch(place, seed=9))["loss"]
    return [*losses, float(total / weight)]


@pytest.mark.full
def test_thirty_steps_and_evaluation_follow_the_unpipelined_run():
    assert curve(False)[-3] < curve(False)[0] - 0.1
    np.testing.assert_allclose(curve(True), curve(False), rtol=1e-4)


def test_the_canonical_state_is_that_of_the_unpipelined_model():
    """What checkpoints store has the shapes of a model that never saw a pipeline, optimizer state included."""
    mesh = {"pipe": 2, "fsdp": 2, "tensor": 2}
    place, plain = tiny.partitioner(**mesh), llama({}, n_layers=5)
    for name in ("adamw", "adafactor", "muon"):
        model = llama(mesh, ("interleaved", 4, 2), n_layers=5)
        tx = optimizer(name, model.weights, lr=0.1)
        stored = abstract_canonical(model, tx, place)
        want = abstract_state(plain, optimizer(name, plain.weights, lr=0.1), place)
        shapes = [jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree) for tree in (stored, want)]
        assert shapes[0] == shapes[1]
        state = init_state(model, tx, place, seed=2)
        there_and_back = model.live(model.canonical(state))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(there_and_back), jax.device_get(state))


@pytest.mark.full
def test_padded_slots_stay_zero():
    mesh = {"pipe": 4}
    place, model = tiny.partitioner(**mesh), llama(mesh, ("1f1b", 4, 1), n_layers=5)
    tx = optimizer("adamw", model.weights, lr=0.1, weight_decay=0.1)
    state, step = init_state(model, tx, place), make_train_step(model, tx, place)
    for _ in range(3):
        state, _ = step(state, tiny.batch(place))
    empty = model.execution.layers_CRk < 0
    assert empty.sum() == 3
    for leaf in jax.tree.leaves(state.params["blocks"]["layer"]):
        assert not np.asarray(leaf)[empty].any()


def test_layers_are_spread_evenly_with_fewer_at_the_ends():
    for stages in range(1, 17):
        for layers in range(stages, 50):
            counts = layers_per_stage(layers, stages)
            assert sum(counts) == layers
            assert max(counts) - min(counts) <= 1
            assert layers % stages in (0, stages - 1) or counts[0] == counts[-1] == min(counts)
    with pytest.raises(UserError, match=r"n_layers = 3: 4 pipeline stages .* need a layer each"):
        layers_per_stage(3, 4)


@cache
def program(microbatches: int, other: str = "fsdp") -> tuple[str, list[Collective]]:
    mesh = {"pipe": 4, other: 2}
    place, model = tiny.partitioner(**mesh), llama(mesh, ("1f1b", microbatches, 1), n_layers=8)
    tx = optimizer("sgd", model.weights, lr=0.1)
    step = make_train_step(model, tx, place)
    batch = tiny.batch(place, rows=2 * microbatches)
    text = step.lower(abstract_state(model, tx, place), batch).compile().as_text()
    return text, collectives(text, place.mesh)


@pytest.mark.full
def test_the_program_does_not_grow_with_the_microbatches():
    small, large = (len(program(m)[0].splitlines()) for m in (4, 16))
    assert abs(large - small) <= 0.01 * small


def test_messages_move_at_the_top_of_the_tick_loop_as_open_chains_and_nothing_is_conditional():
    text, found = program(4)
    conditionals = re.findall(r"( conditional\(.*)", text)
    assert len(conditionals) == 1
    assert f"jit(step)/{UNIFORM}/cond" in conditionals[0]  # the guard against a gradient that is not finite
    moves = [c for c in found if c.kind == "collective-permute"]
    assert moves
    for move in moves:
        assert move.axes == {"pipe"}
        assert len(move.loops) == 1, move  # in the loop over ticks, and in no loop within
        assert len({a for a, _ in move.groups}) == len(move.groups) == 6  # three edges, on each of two fsdp ranks
        assert {a for a, _ in move.groups} != {b for _, b in move.groups}, "a closed ring"


@pytest.mark.full
def test_each_gradient_is_reduced_over_data_once_per_step():
    _, found = program(4, "data")
    weights = flatten(llama({}, n_layers=8).weights)
    over_data = [shape for c in found if "data" in c.axes for shape in c.shapes if shape]
    assert all(c.loops == () for c in found if "data" in c.axes)
    assert len(over_data) == len(weights)


def test_each_gradient_is_reduced_over_fsdp_once_per_backward_tick():
    _, found = program(4)
    weights = flatten(llama({}, n_layers=8).weights)
    # Within the loop over ticks, a gradient of a layer is reduced over fsdp in the loop over layers, once.
    reduced = [c for c in found if c.kind != "all-gather" and c.axes == {"fsdp"} and len(c.loops) == 2]
    per_layer = [w for path, w in weights.items() if path.startswith("blocks.") and w.role == "matrix"]
    matrices = [shape for c in reduced for shape in c.shapes if len(shape) > 1]
    backward_segments = 2  # 1f1b: steady state and cool-down
    assert len(matrices) == backward_segments * len(per_layer)


def test_a_model_that_cannot_be_cut_is_refused_by_name():
    from flax import nnx

    class Normalised(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)

    table = schedules.make("1f1b", 2, 4)
    with pytest.raises(UserError, match=r"Normalised cannot be pipelined: the forward pass changes norm.mean"):
        ModelDef(Normalised, schedule=table, replicate_unannotated=True)
    model = llama({"pipe": 2}, ("1f1b", 4, 1))
    with pytest.raises(UserError, match="a loss function of its own cannot be pipelined"):
        make_train_step(model, optax.sgd(0.1), tiny.partitioner(pipe=2), loss=lambda *_: None)
    with pytest.raises(UserError, match=r"accumulate = .*: a pipeline has microbatches of its own"):
        make_train_step(model, optax.sgd(0.1), tiny.partitioner(pipe=2), accumulate=2)


@pytest.mark.parametrize(("microbatches", "chunks", "idle", "enough"), [(4, 1, "43%", 9), (2, 2, "56%", 8)])
def test_few_microbatches_are_warned_of_with_the_bubble(microbatches, chunks, idle, enough, caplog):
    def warnings(microbatches: int) -> list[str]:
        caplog.clear()
        model = llama({"pipe": 4}, ("interleaved", microbatches, chunks), n_layers=8)
        make_train_step(model, optax.sgd(0.1), tiny.partitioner(pipe=4))
        return caplog.messages

    (warning,) = warnings(microbatches)
    assert f"{microbatches} microbatches on 4 ranks" in warning
    assert f"idle for {idle} of the time" in warning
    assert f"set pipeline.microbatches to {enough} or more, a divisor of the rows per device" in warning
    assert all(warnings(enough + more) == [] for more in range(4))
