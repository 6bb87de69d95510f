"""The step: accumulation, auxiliary terms, the guard, precision, and modules that the library has never seen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from helpers import equations
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.pipeline.microbatches import microbatch, microbatches
from shardtrain.sharding import use
from shardtrain.train.evaluation import evaluate
from shardtrain.train.gradients import Gradients
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_eval_step, make_train_step


def test_microbatch_m_is_the_rows_m_mod_count():
    split = microbatches({"row": jnp.arange(12), "x": jnp.arange(24).reshape(12, 2)}, 3, "optimizer.accumulate")
    rows = [microbatch(split, m)["row"] for m in range(3)]
    np.testing.assert_array_equal(rows, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    np.testing.assert_array_equal(microbatch(split, 2)["x"][1], [10, 11])


class WithAux(nnx.Module):
    """A block whose auxiliary term has a normaliser of its own: the tokens of even rows."""

    def __init__(self, rngs):
        self.mlp = nn.GatedMLP(8, 16, precision=nn.Precision(jnp.float64, jnp.float64, jnp.float64), rngs=rngs)

    def __call__(self, x, ctx):
        even = (ctx.inputs["row"] % 2 == 0)[:, None] * ctx.inputs["loss_mask"]
        x = x + self.mlp(x, ctx)
        return x, {"size": ((jnp.square(x).mean(-1) * even).sum(), even.sum())}


class AuxModel(nnx.Module):
    def __init__(self, rngs):
        p = nn.Precision(jnp.float64, jnp.float64, jnp.float64)
        self.embedding = nn.Embedding(64, 8, precision=p, rngs=rngs)
        self.blocks = nn.Stack(WithAux, 2, rngs=rngs)

    def embedder(self, batch, ctx):
        return self.embedding(batch["tokens"])

    def head(self, x, batch, ctx):
        return nn.cross_entropy(self.embedding.attend(x), batch["targets"], batch["loss_mask"])


@pytest.mark.parametrize(("mesh", "accumulate"), [({"data": 2, "fsdp": 2}, 4), ({}, 2), ({"data": 4}, 1)])
def test_each_auxiliary_term_has_its_own_global_normaliser(mesh, accumulate):
    with jax.enable_x64(True):
        place, model = tiny.partitioner(**mesh), ModelDef(AuxModel)
        state = init_state(model, optax.sgd(1.0), place)

        def run(state, batch):
            with use(place):
                key = jax.random.key(0)
                return Gradients(model, place, accumulate=accumulate, reduce_dtype=jnp.float64)(state, batch, key)[:2]

        grads, sums = jax.jit(run)(state, tiny.batch(place))
        batch = tiny.batch()

        def plain(params):
            (loss, aux) = nn.forward(model.merge(params, {}), batch, nn.Context(batch))
            return loss[0] / loss[1] + aux["size"][0] / aux["size"][1]

        assert tiny.relative_error(grads, jax.grad(plain)(jax.device_get(state.params))) < 1e-12
        assert float(sums["size"][1]) == 2 * float(batch["loss_mask"][::2].sum())


def test_auxiliary_weights_cost_no_second_forward_pass():
    """Two blocks forward and backward are 3 units of matmul work; a kept pre-pass would make it 4."""
    with jax.enable_x64(True):
        place, model = tiny.partitioner(), ModelDef(AuxModel)
        state = init_state(model, optax.sgd(1.0), place)

        def flops(with_aux: bool) -> float:
            def loss(params, batch):
                (total, weight, _), aux = nn.forward(model.merge(params, {}), batch, nn.Context(batch))
                return total / weight + (aux["size"][0] / aux["size"][1] if with_aux else 0)

            def run(state, batch):
                return Gradients(model, place, reduce_dtype=jnp.float64)(state, batch, jax.random.key(0))[0]

            fn = run if with_aux else lambda state, batch: jax.grad(loss)(state.params, batch)
            return jax.jit(fn).lower(state, tiny.batch()).compile().cost_analysis()["flops"]

        assert flops(True) < 1.05 * flops(False)


class Bomb(nnx.Module):
    """A model with a loss of `scale * sum(w * x)`: its batch decides whether the loss is finite."""

    def __init__(self, rngs):
        self.w = nn.param(rngs.params(), (4,), ("embed",), jax.nn.initializers.ones, jnp.float32, "matrix")


def bomb_loss(model, batch, ctx):
    return (model.w[...] * batch["x"]).sum(), jnp.float32(len(batch["x"])), {}


def test_a_non_finite_step_changes_nothing_and_is_counted():
    place, model = tiny.partitioner(data=2), ModelDef(Bomb)
    tx = optimizer("adamw", model.weights, lr=0.1, clip_norm=1.0)
    step = make_train_step(model, tx, place, loss=bomb_loss, lr=lambda count: 0.1 * count)
    state = init_state(model, tx, place)
    good, bad = ({"x": jnp.full((2, 4), v)} for v in (1.0, np.nan))
    state, _ = step(state, good)
    before = jax.device_get((state.params, state.opt_state))
    for in_row in (1, 2):
        state, metrics = step(state, bad)
        assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == in_row
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    state, metrics = step(state, good)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"]), int(state.step)) == (2, 0, 4)
    assert float(metrics["lr"]) == pytest.approx(0.1)  # the schedule counts applied updates
    assert (np.asarray(state.params["w"]) != before[0]["w"]).all()


def test_clipping_takes_the_norm_of_the_gradient_that_is_reported():
    place, model = tiny.partitioner(), tiny.llama()
    for clip_norm in (None, 1e-3):
        tx = optimizer("adamw", model.weights, lr=0.1, clip_norm=clip_norm)
        step, state = make_train_step(model, tx, place), abstract_state(model, tx, place)
        roots = [e for e in equations(step, state, tiny.batch(place)) if e.primitive.name == "sqrt"]
        assert sum(e.outvars[0].aval.shape == () for e in roots) == 1


def test_a_clip_within_other_transforms_takes_the_norm_of_what_it_gets():
    place, model = tiny.partitioner(), tiny.llama()
    tx = optax.chain(optax.scale(10.0), optimizer("sgd", model.weights, lr=1.0, clip_norm=1e-3))
    state = init_state(model, tx, place)
    before = jax.device_get(state.params)
    after = make_train_step(model, tx, place)(state, tiny.batch(place))[0].params
    assert optax.tree.norm(optax.tree.sub(jax.device_get(after), before)) == pytest.approx(1e-3, rel=1e-2)


def test_the_state_is_donated():
    place, model = tiny.partitioner(fsdp=2), tiny.llama()
    tx = optimizer("sgd", model.weights, lr=0.1)
    state = init_state(model, tx, place)
    leaves = jax.tree.leaves(state.params)
    make_train_step(model, tx, place)(state, tiny.batch(place))
    assert all(leaf.is_deleted() for leaf in leaves)


@pytest.mark.full
def test_bfloat16_compute_keeps_float32_masters_and_float32_gradients():
    place = tiny.partitioner(data=2, fsdp=2)
    half = nn.Precision(jnp.float32, jnp.bfloat16, jnp.float32)
    from shardtrain.models.llama import Llama

    model = ModelDef(lambda rngs: Llama(**{**tiny.SIZES, "n_layers": 1}, precision=half, rngs=rngs))
    tx = optimizer("adamw", model.weights, lr=1e-2)
    state, step = init_state(model, tx, place), make_train_step(model, tx, place, accumulate=2)
    losses = []
    for _ in range(8):
        state, metrics = step(state, tiny.batch(place))
        losses.append(float(metrics["loss"]))
    assert {str(a.dtype) for a in jax.tree.leaves(state.params)} == {"float32"}
    assert losses[-1] < losses[0] - 0.3
    full = gradients_of(tiny.llama(n_layers=1), place)
    assert tiny.relative_error(gradients_of(model, place), full) < 0.1
    assert tiny.relative_error(gradients_of(model, place, reduce=jnp.bfloat16), full) < 0.1


def gradients_of(model: ModelDef, place: Any, reduce: Any = jnp.float32) -> Any:
    state = init_state(model, optax.sgd(0.1), place)

    def run(state, batch):
        with use(place):
            return Gradients(model, place, reduce_dtype=reduce)(state, batch, jax.random.key(0))[0]

    return jax.jit(run)(state, tiny.batch(place))


class Stranger(nnx.Module):
    """A researcher's own module: plain Flax layers, BatchNorm, Dropout, no idea of meshes."""

    replicate_unannotated = True

    def __init__(self, rngs):
        # No bias: before a BatchNorm its gradient is zero, and Adam would blow the rounding errors up.
        self.a = nnx.Linear(4, 32, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.b = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.b(self.dropout(nnx.relu(self.norm(self.a(x)))))


class Annotated(nnx.Module):
    """Another one, with Flax's own annotations."""

    def __init__(self, rngs):
        kernel = nnx.initializers.lecun_normal()
        none = {"use_bias": False, "rngs": rngs}
        self.a = nnx.Linear(4, 32, kernel_init=nnx.with_partitioning(kernel, ("embed", "mlp")), **none)
        self.b = nnx.Linear(32, 1, kernel_init=nnx.with_partitioning(kernel, ("mlp", None)), **none)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


def squared_error(model, batch, ctx):
    error = jnp.square(model(batch["x"])[:, 0] - batch["y"])
    return (
        error.sum(),
        jnp.float32(len(error)),
        {"absolute": (jnp.sqrt(error).sum(), jnp.float32(len(error)))},
    )


def regression(rows: int = 32) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(-1))}


@pytest.mark.parametrize("module", [Stranger, Annotated])
def test_a_module_never_seen_before_trains_alike_on_every_mesh(module):
    def train(**mesh: int) -> tuple[list[float], Any]:
        place, model = tiny.partitioner(**mesh), ModelDef(module)
        tx = optimizer("adamw", model.weights, lr=3e-3)
        state, step = init_state(model, tx, place), make_train_step(model, tx, place, loss=squared_error)
        batch = {k: jax.device_put(v, place.sharding(("batch",))) for k, v in regression().items()}
        losses = []
        for _ in range(20):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        held_out = evaluate(make_eval_step(model, place, loss=squared_error), state, [batch])
        return [*losses, held_out["loss"], held_out["absolute"]], state

    want, _ = train()
    got, state = train(data=2, fsdp=2, tensor=2)
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert want[19] < 0.7 * want[0]
    if module is Stranger:
        assert float(jnp.abs(state.model_state["norm"]["mean"]).max()) > 0.01  # the statistics moved
    else:
        assert state.params["a"]["kernel"].sharding.spec == jax.P("fsdp", "tensor")


def test_weights_without_axes_need_the_models_consent():
    class Silent(Stranger):
        replicate_unannotated = False

    with pytest.raises(
        UserError, match=r"Silent has 5 weights without logical axes \(a.kernel, .*replicate_unannotated"
    ):
        ModelDef(Silent)


def test_accumulation_is_refused_where_the_forward_pass_changes_state():
    model = ModelDef(Stranger)
    with pytest.raises(UserError, match=r"accumulate is 2, but the model changes norm.mean, norm.var"):
        make_train_step(model, optax.sgd(0.1), tiny.partitioner(), loss=squared_error, accumulate=2)


def test_evaluation_is_the_mean_over_all_batches_and_has_no_dropout():
    place, model = tiny.partitioner(fsdp=2), tiny.llama(dropout=0.5)
    state = init_state(model, optax.sgd(0.1), place)
    step = make_eval_step(model, place)
    halves = [tiny.batch(place, rows=8, seed=1), tiny.batch(place, rows=8, seed=2)]
    whole = {k: jnp.concatenate([halves[0][k], halves[1][k]]) for k in halves[0]}
    assert evaluate(step, state, halves)["loss"] == pytest.approx(evaluate(step, state, [whole])["loss"], rel=1e-6)
    assert evaluate(step, state, [whole]) == evaluate(step, state, [whole])
    with pytest.raises(UserError, match="no batches"):
        evaluate(step, state, [])


@pytest.mark.parametrize("mesh", [{}, {"pipe": 2}])
@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_only_a_step_on_rows_with_segment_ids_reads_them(mesh, kind):
    place, tx = tiny.partitioner(**mesh), optax.sgd(0.1)
    schedule = schedules.make("1f1b", 2, 2, 1) if mesh else None
    model = ModelDef(lambda rngs: Llama(**tiny.SIZES, rngs=rngs), schedule=schedule)
    batch = tiny.batch(place)
    bare = {name: leaf for name, leaf in batch.items() if name != "segment_ids"}

    def leaves_read(batch):
        step = make_train_step(model, tx, place) if kind == "train" else make_eval_step(model, place)
        program = step.lower(abstract_state(model, tx, place), batch).as_text()
        return program[: program.index("->")].count("%arg")

    assert leaves_read(batch) == leaves_read(bare) + 1
