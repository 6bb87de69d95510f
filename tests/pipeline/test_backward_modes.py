"""Whatever a pipeline keeps for its backward pass, gradients are the single-device ones, and no work is done twice."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend import core

import tiny
from shardtrain import nn
from shardtrain.models.llama import Llama
from shardtrain.pipeline import schedules
from shardtrain.pipeline.split_backward import split_backward
from shardtrain.pipeline.split_function import split_function
from shardtrain.pipeline.stage import MicrobatchAtStage, StageFunctions
from shardtrain.sharding import use
from shardtrain.train.gradients import Gradients
from shardtrain.train.model_def import ModelDef
from shardtrain.train.model_parts import model_parts, split_layers
from shardtrain.train.state import init_state

F64 = nn.Precision(jnp.float64, jnp.float64, jnp.float64)


class Block(nnx.Module):
    """What a user's block may do: a pytree in and out, a jitted helper called twice, a weight that no matmul uses."""

    def __init__(self, rngs):
        self.mlp = nn.GatedMLP(8, 16, dropout=0.2, precision=F64, rngs=rngs)
        self.scale = nn.param(rngs.params(), (8,), ("embed",), jax.nn.initializers.normal(0.3), jnp.float64, "norm")

    def __call__(self, x, ctx):
        h, size = x
        h = _squash(h + self.mlp(jnp.tanh(_squash(h)), ctx) * jnp.exp(self.scale[...]))
        # Half of the microbatches hold no even row: their part of this term has weight 0.
        even = (ctx.inputs["row"] % 2 == 0)[:, None] * ctx.inputs["loss_mask"]
        return (h, size + h.mean((1, 2))), {"size": ((jnp.square(h).mean(-1) * even).sum(), even.sum())}


@jax.jit
def _squash(h):
    return jax.nn.relu(h) + 0.1 * jnp.sin(h)


class Tied(nnx.Module):
    """Tied embeddings around the blocks."""

    def __init__(self, n_layers, remat, rngs):
        self.embedding = nn.Embedding(64, 8, precision=F64, rngs=rngs)
        self.blocks = nn.Stack(Block, n_layers, remat=remat, rngs=rngs)

    def embedder(self, batch, ctx):
        h = self.embedding(batch["tokens"])
        return h, jnp.zeros(h.shape[:1], h.dtype)

    def head(self, x, batch, ctx):
        h, size = x
        return nn.cross_entropy(
            self.embedding.attend(h) + size[:, None, None] * jnp.arange(64), batch["targets"], batch["loss_mask"]
        )


def make(kind, n_layers, remat):
    if kind == "tied":
        return partial(Tied, n_layers, remat)
    options = {**tiny.SIZES, "n_layers": n_layers, "remat": remat, "dropout": 0.1}
    return lambda rngs: Llama(**options, precision=F64, rngs=rngs)


def v_shaped(ranks, microbatches):
    """A user's own schedule: down the ranks and back up, with a backward pass in one piece."""
    stages = 2 * ranks
    r, c, m = np.ogrid[:ranks, :2, :microbatches]
    stage = np.where(c == 0, r, stages - 1 - r)
    ticks = {"F": 2 * m + stage, "B": 2 * m + 2 * (stages - 1) - stage}
    return schedules.tabulate("v", schedules.vee(ranks), ticks)


def gradients(mesh, model):
    """Sums and canonical gradients of one step."""
    place = tiny.partitioner(**mesh)
    state = init_state(model, optax.sgd(0.1), place, seed=3)

    @jax.jit
    def run(state, batch):
        with use(place):
            grads, sums, _ = Gradients(model, place, reduce_dtype=jnp.float64)(state, batch, jax.random.key(7))
            return sums, model.canonical(grads)

    return jax.tree.map(np.asarray, run(state, tiny.batch(place, rows=32)))


@cache
def wanted(kind, n_layers, remat):
    with jax.enable_x64(True):
        return gradients({}, ModelDef(make(kind, n_layers, remat)))


def case(schedule, backward, mesh, kind, n_layers, remat="full"):
    """Meshes in words, such as `pipe2 data4`; schedules as `name microbatches chunks`; backward mode, and `skip`."""
    return pytest.param(
        schedule, backward, mesh, kind, n_layers, remat, id=f"{schedule}, {backward}, {mesh}, {kind} {n_layers} {remat}"
    )


#: Together: each schedule and mode; pipe 2 and 4, each other axis; uneven layers; few microbatches.
QUICK = [
    case("zb_v 2 2", "split", "pipe4 tensor2", "tied", 9),
    case("gpipe 2 1", "save", "pipe4 data2", "tied", 6),
    case("v 4 2", "remat", "pipe4", "tied", 8),
    case("zb_h1 2 1", "split skip", "pipe4 fsdp2", "tied", 9),
    case("1f1b 4 1", "remat skip", "pipe2 data2 fsdp2", "llama", 5),
]


def everything():
    """Every schedule and mode on every kind of mesh; numbers of microbatches, models and remat policies in turn."""
    yield case("zb_h1 4 1", "split", "pipe2 data2 fsdp2", "llama", 2)
    yield case("1f1b 4 1", "save", "pipe8", "tied", 8, "none")
    yield case("interleaved 4 2", "save", "pipe2 fsdp2 tensor2", "llama", 5, "dots")
    yield case("interleaved 4 2", "save skip", "pipe2 fsdp2 tensor2", "llama", 5, "dots")
    modes = [(name, mode) for name in ("gpipe", "1f1b", "interleaved", "v") for mode in ("remat", "save")]
    modes += [("zb_h1", "split"), ("zb_v", "split")]
    three = ["pipe2 data2 tensor2", "pipe2 fsdp2 tensor2", "pipe2 data2 fsdp2"]
    meshes = ["pipe2", "pipe4", "pipe8", "pipe4 data2", *three]
    turns = itertools.cycle(itertools.product((2, 4, 8), ("tied", "llama"), ("full", "none", "dots")))
    for ((name, mode), mesh), (microbatches, kind, remat) in zip(itertools.product(modes, meshes), turns, strict=False):
        chunks = {"gpipe": 1, "1f1b": 1, "zb_v": 2, "v": 2}.get(name, microbatches.bit_length() - 1)
        options = mesh, kind, int(mesh[4]) * chunks + 1, remat
        yield case(f"{name} {microbatches} {chunks}", mode, *options)
        if mesh in ("pipe4", *three):
            yield case(f"{name} {microbatches} {chunks}", f"{mode} skip", *options)


@pytest.mark.parametrize(
    ("schedule", "backward", "mesh", "kind", "n_layers", "remat"),
    [*QUICK, *(pytest.param(*p.values, id=p.id, marks=pytest.mark.full) for p in everything())],
)
def test_loss_and_gradients_equal_the_single_device_ones(schedule, backward, mesh, kind, n_layers, remat):
    sizes = {word[:-1]: int(word[-1]) for word in mesh.split()}
    name, microbatches, chunks = schedule.split()
    ranks, microbatches, chunks = sizes["pipe"], int(microbatches), int(chunks)
    table = v_shaped(ranks, microbatches) if name == "v" else schedules.make(name, ranks, microbatches, chunks)
    with jax.enable_x64(True):
        mode, *skip = backward.split()
        options = {"backward": mode} if mode != "split" else {}
        options |= {"idle": "skip"} if skip else {}
        model = ModelDef(make(kind, n_layers, remat), schedule=table, **options)
        assert tiny.relative_error(gradients(sizes, model), wanted(kind, n_layers, remat)) < 1e-12


def flops(jaxpr) -> int:
    """Floating-point operations of a jaxpr's matmuls."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(flops(j) for j in core.jaxprs_in_params(eqn.params))
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[d] for d in contracted]))
    return total


LAYERS = 3


@cache
def work(remat: str, skip: bool = False):
    """The work of a stage of three Llama layers: as one piece, cut at dx, and cut at dy; bfloat16 compute."""
    precision = nn.Precision(jnp.float32, jnp.bfloat16, jnp.float32)
    options = {**tiny.SIZES, "d_ff": 96, "n_layers": LAYERS, "remat": remat, "dropout": 0.1}
    model = ModelDef(lambda rngs: Llama(**options, precision=precision, rngs=rngs))
    stacked, shared = split_layers(jax.eval_shape(lambda: model.init(jax.random.key(0))[0]))
    batch, on = tiny.batch(), np.True_
    at = MicrobatchAtStage(on, on, on, np.int32(0), np.arange(LAYERS, dtype=np.int32), batch)
    found = {}

    def parts(stacked, shared, key):
        one = StageFunctions(
            model_parts(model, lambda x: x),
            jax.tree.map(lambda a: a[None], stacked),
            shared,
            nn.Context(batch, key=key, train=True),
            {},
            skip=skip,
        )
        x = jax.eval_shape(one.embed, at)
        totals = {"sums": jax.eval_shape(lambda: one.head(shared, jnp.zeros(x.shape, x.dtype), at)), "dshared": shared}
        whole = lambda p, x, g, totals: one.backward(p, x, g, at, totals)  # noqa: E731
        found["whole"] = jax.make_jaxpr(whole)(one.params(at), x, x, totals).jaxpr
        found["forward"] = jax.make_jaxpr(lambda p, x: one.forward(p, x, at))(one.params(at), x).jaxpr
        both = one.split_forward_backward(at)
        found["dy"] = both.jaxprs, both.residuals
        split, own = split_backward(one, at), one.params(at)
        first = jax.make_jaxpr(lambda p, x, g, totals: split.input_gradient(p, x, g, at, totals))(own, x, x, totals)
        second = jax.make_jaxpr(split.weight_gradient)(own, split.operands)
        found["dx"] = (first.jaxpr, second.jaxpr), split.operands

    jax.eval_shape(parts, stacked, shared, jax.random.key(0))
    matrices = [a for a in jax.tree.leaves(stacked) if a.ndim > 2]
    return found, sum(2 * batch["tokens"].size * a.size for a in matrices), {a.shape[1:] for a in matrices}


@pytest.mark.parametrize(("remat", "skip"), [("none", False), ("full", False), ("none", True)])
def test_weight_gradients_are_all_that_is_left_for_the_second_half(remat, skip):
    found, weights, shapes = work(remat, skip)
    (first, second), kept = found["dx"]
    assert flops(second) == weights  # a matmul per weight, and nothing computed again
    assert flops(first) + flops(second) == flops(work("none")[0]["whole"])
    assert flops(first) + flops(second) <= flops(found["whole"])
    # Kept: of each matmul, in the compute dtype, its input and the gradient of its output; and gradients of norms.
    assert shapes.isdisjoint(a.shape[1:] for a in kept)
    assert all(a.dtype == jnp.bfloat16 for a in kept if a.ndim > 2)
    tokens, d, heads, kv, ff = 16 * 16, 32, 32, 16, 96
    inputs, outputs = (d + heads + d + ff), (heads + 2 * kv + d + 2 * ff + d)
    assert sum(a.size for a in kept) == LAYERS * (tokens * (inputs + outputs) + 2 * d)


def test_what_a_forward_pass_saves_is_computed_once_and_holds_no_weights():
    found, weights, shapes = work("none")
    (first, second), kept = found["dy"]
    assert flops(first) == flops(found["forward"])
    assert flops(second) == 2 * flops(first)
    assert flops(first) > weights
    assert all(shapes.isdisjoint((a.shape, a.shape[1:])) for a in kept)


def test_a_saved_forward_pass_follows_the_remat_policy():
    elements = {
        remat: sum(a.size for a in work(remat)[0]["dy"][1] if a.dtype == jnp.bfloat16)
        for remat in ("full", "dots", "none")
    }
    x = 16 * 16 * 32
    assert elements["full"] == LAYERS * x  # inputs of the layers
    assert elements["full"] < elements["dots"] < elements["none"]


def test_halves_put_off_matmuls_and_keep_the_least():
    def function(w, early, late):
        x, narrow = early
        twice = _squash(_squash(x))
        summed = (x * twice).sum(0)  # smaller than what it is made of
        return twice.sum() * narrow.sum(), (x.T @ twice, summed, w * jnp.exp(w) * late, (narrow * 2).astype(x.dtype))

    w, x, late = jnp.ones(5), jnp.arange(12.0).reshape(4, 3), jnp.float32(3)
    narrow = jnp.arange(6, dtype=jnp.bfloat16)
    halves = split_function(function, w, (x, narrow), late)
    now, kept = halves.first(w, (x, narrow))
    assert sorted((a.shape, str(a.dtype)) for a in kept) == sorted((a.shape, str(a.dtype)) for a in halves.residuals)
    assert sorted((a.shape, str(a.dtype)) for a in kept) == [
        ((3,), "float32"),
        ((4, 3), "float32"),
        ((4, 3), "float32"),
        ((6,), "bfloat16"),
    ]
    got = now, halves.second(w, late, kept)
    jax.tree.map(np.testing.assert_array_equal, got, function(w, (x, narrow), late))


def test_what_the_first_half_returns_cannot_wait_for_the_late_arguments():
    with pytest.raises(AssertionError, match="needed now"):
        split_function(lambda known, early, late: (early * late, late), (), jnp.ones(3), jnp.ones(3))


def test_what_has_an_effect_is_done_once_and_as_soon_as_it_can_be(capfd):
    def function(known, early, late):
        jax.debug.print("early {}", early.sum())
        jax.debug.print("late {}", late.sum())
        return early.sum(), early @ late

    halves = split_function(function, (), jnp.ones((2, 2)), jnp.ones((2, 3)))
    _, kept = jax.jit(halves.first)((), jnp.ones((2, 2)))
    jax.effects_barrier()
    assert capfd.readouterr().out == "early 4.0\n"
    jax.jit(halves.second)((), jnp.ones((2, 3)), kept)
    jax.effects_barrier()
    assert capfd.readouterr().out == "late 6.0\n"
