"""The stack of blocks: scanned, unrolled and rematerialised it is the same function, one layer after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import tiny
from helpers import equations, filled, quick
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.nn.param import describe
from shardtrain.train.model_def import ModelDef
from shardtrain.weights.paths import flatten

F32 = nn.Precision()
F64 = nn.Precision(jnp.float64, jnp.float64, jnp.float64)
BATCH = tiny.batch(rows=3, length=5, vocab=10, packed=True)
WIDTH = 4


class Block(nnx.Module):
    """A residual MLP with dropout on a pytree, and two auxiliary sums."""

    def __init__(self, rngs, precision=F32):
        options = {"precision": precision, "rngs": rngs}
        self.norm = nn.RMSNorm(WIDTH, **options)
        self.up = nn.Linear("BSD,DF->BSF", (WIDTH, 6), ("embed", "mlp"), bias=True, **options)
        self.down = nn.Linear("BSF,FD->BSD", (6, WIDTH), ("mlp", "embed"), **options)
        self.drop = nn.Dropout(0.2, site="mlp")

    def __call__(self, x, ctx):
        h = checkpoint_name(self.norm(x["h"]), "normed")
        y = self.drop(self.down(jnp.tanh(checkpoint_name(self.up(h), "hidden"))), ctx)
        mask = ctx.inputs["loss_mask"].astype(y.dtype)
        aux = {"size": ((jnp.square(y).mean(-1) * mask).sum(), mask.sum()), "depth": (ctx.layer * 1.0, jnp.ones(()))}
        return {"h": x["h"] + y, "steps": x["steps"] + 1}, aux


def stack(n_layers=3, precision=F64, **options):
    make = lambda rngs: Block(rngs, precision)  # noqa: E731
    return filled(lambda: nn.Stack(make, n_layers, **options, rngs=nnx.Rngs(0)))


def start(dtype=np.float64):
    h = np.random.default_rng(1).normal(size=(3, 5, WIDTH))
    return {"h": jnp.asarray(h, dtype), "steps": jnp.zeros((), jnp.int32)}


def context():
    return nn.Context(BATCH, key=jax.random.key(7), train=True)


def run(module):
    """Output, auxiliary sums, and the gradient of a function of both by weights and input."""
    graph, state = nnx.split(module)

    def objective(state, h):
        x, aux = nnx.merge(graph, state)(start() | {"h": h}, context())
        return jnp.sin(x["h"]).sum() + aux["size"][0] / aux["size"][1], (x, aux)

    return quick(jax.grad(objective, argnums=(0, 1), has_aux=True))(state, start()["h"])


@pytest.fixture(scope="module")
def reference():
    """Layer by layer, by hand."""
    with jax.enable_x64(True):
        graph, state = nnx.split(stack(remat="none"))

        def objective(state, h):
            module, x, total = nnx.merge(graph, state), start() | {"h": h}, []
            for i in range(3):
                params = jax.tree.map(lambda a, i=i: a[i], module.params())
                x, aux = module.apply_block(params, x, context().at_layer(i))
                total.append(aux)
            aux = jax.tree.map(lambda *parts: sum(parts), *total)
            return jnp.sin(x["h"]).sum() + aux["size"][0] / aux["size"][1], (x, aux)

        return quick(jax.grad(objective, argnums=(0, 1), has_aux=True))(state, start()["h"])


WAYS = [(remat, True) for remat in ("none", "full", "dots", "offload:hidden", "names:normed,hidden")]
LONG = [(remat, False) for remat in ("none", "dots", "offload", ("normed",))]


@pytest.mark.parametrize(
    ("remat", "scan"), [*WAYS, ("full", False), *(pytest.param(*way, marks=pytest.mark.full) for way in LONG)], ids=str
)
def test_scan_and_remat_change_nothing(x64, reference, remat, scan):
    got = run(stack(remat=remat, scan=scan))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_auxiliary_sums_add_up_over_layers(reference):
    _, (x, aux) = reference
    assert x["steps"] == 3
    assert [float(a) for a in aux["depth"]] == [0 + 1 + 2, 3]
    assert float(aux["size"][1]) == 3 * float(BATCH["loss_mask"].sum())


def test_one_layer(x64):
    module = stack(1)

    def both():
        alone = jax.tree.map(lambda a: a[0], module.params())
        return module(start(), context()), module.apply_block(alone, start(), context())

    whole, single = quick(both)()
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)


def test_layers_are_drawn_apart_and_like_a_single_block():
    layer = quick(lambda: nnx.state(nn.Stack(Block, 3, rngs=nnx.Rngs(0)).layer))()
    weights = np.asarray(layer.up.weight[...])
    assert weights.shape == (3, WIDTH, 6)
    assert len({w.tobytes() for w in weights}) == 3
    assert np.array_equal(layer.norm.scale[...], np.ones((3, WIDTH)))
    assert not layer.up.bias[...].any()


def test_every_weight_gains_a_layers_dim():
    model = ModelDef(lambda rngs: nn.Stack(Block, 3, rngs=rngs))
    single = ModelDef(Block)
    stacked, alone = flatten(model.weights), flatten(single.weights)
    assert {path.removeprefix("layer.") for path in stacked} == set(alone)
    for path, one in alone.items():
        many = stacked["layer." + path]
        assert (many.stack, many.axes, many.shape) == (1, ("layers", *one.axes), (3, *one.shape))
        assert (many.role, many.inputs) == (one.role, one.inputs)
        assert many.output_dims == tuple(d + 1 for d in one.output_dims)


def test_the_scanned_program_is_as_long_for_many_layers():
    def length(n_layers, **options):
        module = stack(n_layers, F32, **options)
        return len(equations(lambda: module(start("f4"), context())[0]))

    assert length(2) == length(6)
    assert length(6, scan=False) > 3 * length(6)


@pytest.mark.parametrize(
    ("remat", "dots"),
    # The block has two matmuls, four more in the backward pass. What is not kept runs again, but for the second one,
    # whose result no gradient needs.
    [("none", 6), ("dots", 6), ("full", 7), ("names:normed", 7), ("names:hidden", 6), ("offload:hidden", 6)],
)
def test_a_policy_decides_which_matmuls_run_again(remat, dots):
    graph, state = nnx.split(stack(1, F32, remat=remat, scan=False))
    found = equations(jax.grad(lambda s: nnx.merge(graph, s)(start("f4"), context())[0]["h"].sum()), state)
    assert len([e for e in found if e.primitive.name == "dot_general"]) == dots


class Normed(nnx.Module):
    """Holds statistics that change in the forward pass."""

    def __init__(self, rngs):
        self.inner = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x, ctx):
        return self.inner(x), {}


class Dropping(nnx.Module):
    """Holds a random stream of Flax's own."""

    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, ctx):
        return self.drop(x), {}


@pytest.mark.parametrize(
    ("block", "named"), [(Normed, r"inner\.mean, a BatchStat"), (Dropping, r"drop\.rngs.*, a Rng")]
)
def test_a_block_with_mutable_state_is_refused_by_name(block, named):
    with nnx.use_eager_sharding(False), pytest.raises(UserError, match=f"{named}.*outside the stack"):
        nn.Stack(block, 2, rngs=nnx.Rngs(0))


class FlaxBlock(nnx.Module):
    """A block of plain Flax layers, one annotated."""

    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.a = nnx.Linear(WIDTH, WIDTH, kernel_init=init, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x, ctx):
        return x + self.b(jax.nn.gelu(self.a(x))), {}


def test_plain_flax_layers_stack_too():
    with nnx.use_eager_sharding(False):
        module = filled(lambda: nn.Stack(FlaxBlock, 2, rngs=nnx.Rngs(0)))
        x = start("f4")["h"]
        y, aux = quick(lambda: module(x, context()))()
    expected = np.asarray(x, np.float64)
    for i in range(2):
        h = expected @ np.asarray(module.layer.a.kernel[i])
        expected = expected + np.asarray(jax.nn.gelu(h)) @ np.asarray(module.layer.b.kernel[i])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert aux == {}
    a, b = describe(module.layer.a.kernel), describe(module.layer.b.kernel)
    assert (a.axes, a.annotated, a.stack) == (("layers", "embed", "mlp"), True, 1)
    assert (b.axes, b.annotated, b.role, b.input_dims) == (("layers", None, None), False, "matrix", (1,))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_layers": 0}, "a stack has 0 layers; use 1 or more"),
        ({"n_layers": 2, "remat": "some"}, "remat 'some' is not a policy; use one of none, full, dots, offload"),
        ({"n_layers": 2, "remat": "names:"}, "lists no names"),
        ({"n_layers": 2, "remat": []}, "lists no names"),
    ],
)
def test_mistakes_are_named(options, match):
    with pytest.raises(UserError, match=match):
        nnx.eval_shape(lambda: nn.Stack(Block, **options, rngs=nnx.Rngs(0)))


def kept(remat):
    """How many activations `[B, S, D]` and `[B, S, F]` the forward pass leaves for the backward pass."""
    graph, state = nnx.split(stack(1, F32, remat=remat, scan=False))
    forward = lambda s: nnx.merge(graph, s)(start("f4"), context())[0]["h"]  # noqa: E731
    shapes = [a.shape for a in jax.tree.leaves(jax.eval_shape(lambda s: jax.vjp(forward, s)[1], state))]
    return shapes.count((3, 5, WIDTH)), shapes.count((3, 5, 6))


@pytest.mark.parametrize("names", ["names:normed,hidden", "names:[normed, hidden]", ["normed", "hidden"]], ids=str)
def test_names_are_read_from_text_or_a_list(names):
    assert kept(names) == (2, 1)  # the block's input, and what has a name


@pytest.mark.parametrize("remat", ["names:normed,hiden", "offload:hiden", ["hiden"]], ids=str)
def test_a_name_that_nothing_has_is_refused_while_tracing(remat):
    module = stack(1, F32, remat=remat)
    with pytest.raises(UserError, match=r"remat keeps 'hiden', but no activation.*did you mean hidden"):
        jax.eval_shape(lambda: module(start("f4"), context())[0])


def test_full_keeps_the_input_of_a_block_only():
    assert kept("full") == (1, 0)
    assert kept("names:hidden") == (1, 1)
