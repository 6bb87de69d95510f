"""Moments in fewer bits: what is kept, how exactly, how it is laid out, and that training and checkpoints go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path

import tiny
from helpers import quick
from shardtrain.checkpoint import Checkpointer
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.optim import optimizer
from shardtrain.optim.moments import Quantized, blocks, decode, encode, round_at_random
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_canonical, abstract_state, init_state
from shardtrain.train.step import make_train_step
from shardtrain.weights.layout import match_weights
from shardtrain.weights.weight import Weight

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SIZES = {**tiny.SIZES, "d_model": 128, "d_ff": 256, "n_layers": 3}


def weight(shape, axes, dtype=jnp.float32):
    stack = int(axes[0] == "layers")
    return Weight(shape, jnp.dtype(dtype), axes, "matrix", stack, 1)


def build(moments, *, pipe=1, dtype=jnp.float32, type="adamw", **mesh):
    place = tiny.partitioner(**({"pipe": pipe} if pipe > 1 else {}), **mesh)
    table = schedules.make("1f1b", pipe, 4, 1) if pipe > 1 else None
    precision = Precision(dtype, jnp.float32, jnp.float32)
    model = ModelDef(lambda rngs: Llama(**SIZES, precision=precision, rngs=rngs), schedule=table)
    return model, optimizer(type, model.weights, lr=3e-3, clip_norm=1.0, moments=moments), place


def train(moments, steps, **options):
    model, tx, place = build(moments, **options)
    state = init_state(model, tx, place, seed=1)
    step, losses = make_train_step(model, tx, place), []
    for i in range(steps):
        state, metrics = step(state, tiny.batch(place, seed=i % 3))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((4096, 32, 128), ("embed", "heads", "head_dim"), (0, 64)),
        ((32, 4096, 11008), ("layers", "embed", "mlp"), (2, 172)),  # 64 blocks, for up to 64 devices
        ((128256, 2048), ("vocab", "embed"), (1, 32)),
        ((2048, 128256), ("embed", "vocab"), (0, 32)),
        ((32, 8192), ("layers", "embed"), (1, 128)),
        ((32, 4096), ("layers", "embed"), (1, 64)),
        ((32, 2048), ("layers", "embed"), None),  # a layer's own part counts
        ((8209, 3), ("embed", None), None),  # a prime number
    ],
)
def test_blocks_divide_one_dim_that_is_not_the_vocabulary(shape, axes, expected):
    assert blocks(weight(shape, axes)) == expected


def test_codes_are_near_and_keep_small_values():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(2, 4, 512)).astype("f4") * 10.0 ** rng.integers(-6, 3, (2, 4, 1))
    code, scale = encode(first, 2, 64, None)
    assert (code.dtype, code.shape, scale.shape) == (jnp.int8, (2, 4, 512), (2, 4, 8))
    block = np.repeat(np.asarray(scale), 64, 2)
    share, back = np.abs(first) / block, np.asarray(decode(code, scale, 2))
    # Half a step of the root, 1 / 254, moves a share r by sqrt(r) / 127 at most, and once more its square.
    assert (np.abs(back - first) / block <= np.sqrt(share) / 127 + 1 / 254**2 + 1e-6).all()
    assert (np.sign(back) == np.sign(first))[share > 1e-4].all()

    second = np.square(first)
    code, scale = encode(second, 2, 64, rng.uniform(size=first.shape).astype("f4"))
    assert code.dtype == jnp.uint8
    back = np.asarray(decode(code, scale, 2))
    assert (back > 0).all()  # a 0 here would divide by nothing but eps
    share = (second / np.repeat(np.asarray(scale), 64, 2))[(wide := np.abs(back - second) > 0)]
    assert (np.abs(back / second - 1)[wide][share > 1e-4] < 0.2).all()


def test_rounding_at_random_is_right_on_average():
    noise = (np.arange(4096, dtype="f4") + 0.5) / 4096
    x = np.full(4096, 0.999 * 2.0**-7, "f4")  # less than half of bfloat16's last place below a power of two
    assert float(jnp.asarray(x, jnp.bfloat16)[0]) == 2.0**-7  # to nearest: never decays
    assert abs(np.asarray(round_at_random(x, noise), "f8").mean() / x[0] - 1) < 1e-5
    scale = np.ones((1,), "f4")
    values = np.concatenate([x, scale])[None].repeat(1, 0)
    code, largest = encode(jnp.asarray(values), 1, 4097, np.concatenate([noise, [0.0]]).astype("f4"))
    assert abs(np.asarray(decode(code, largest, 1), "f8")[0, :-1].mean() / x[0] - 1) < 1e-3


def test_second_moments_decay_without_gradients():
    """0.999 of a value is less than half a step below it: to nearest, all that is kept would stand still."""
    w = {"w": weight((64, 128), ("embed", "mlp"))}
    for moments in ("bfloat16", "int8"):
        tx = optimizer("adamw", w, lr=1e-3, moments=moments)
        grad = {"w": jnp.ones((64, 128)).at[:, 0].set(100.0)}

        @quick
        def run(grad, tx=tx):
            _, state = tx.update(grad, tx.init(grad), grad)
            one = lambda state, _: (tx.update(jax.tree.map(jnp.zeros_like, grad), state, grad)[1], None)  # noqa: E731
            return state, jax.lax.scan(one, state, None, length=300)[0]

        start, end = (next(n for n in jax.tree.leaves(s[0].nu) if n.shape == (64, 128)) for s in run(grad))
        if moments == "int8":
            start, end = (decode(s[0].nu.code["w"], s[0].nu.scale["w"], 1) for s in run(grad))
        ratio = np.asarray(end, "f8")[:, 1:].mean() / np.asarray(start, "f8")[:, 1:].mean()
        assert abs(ratio / 0.999**300 - 1) < 0.05, moments


@pytest.mark.parametrize("moments", BYTES)
def test_bytes_of_the_state_of_an_8b_model(moments):
    sizes = {"n_layers": 32, "d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336, "vocab_size": 128256}
    model = ModelDef(lambda rngs: Llama(**sizes, rngs=rngs))
    state = jax.eval_shape(optimizer("adamw", model.weights, lr=1e-3, moments=moments).init, model_params(model))
    n = sum(w.size for w in jax.tree.leaves(model.weights))
    per_weight = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / n
    assert per_weight == pytest.approx({"float32": 8, "bfloat16": 4, "int8": 2 + 2 * 4 / 110}[moments], rel=0.02)


def model_params(model):
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), model.weights)


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"pipe": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("type", ["adamw", "muon"])
def test_codes_and_scales_are_laid_out_like_their_weights(type, mesh):
    model, tx, place = build("int8", type=type, **mesh)
    for state in (abstract_state(model, tx, place), abstract_canonical(model, tx, place)):
        fields = [n for n in jax.tree.leaves(state.opt_state, is_leaf=is_quantized) if is_quantized(n)]
        specs = jax.tree.map(lambda p: p.sharding.spec, state.params)
        codes = 0
        for field in fields:
            assert jax.tree.map(lambda x: x.sharding.spec, field.code) == matched(field.code, specs)
            assert jax.tree.map(lambda x: x.sharding.spec, field.scale) == matched(field.scale, specs)
            codes += sum(x.dtype in (jnp.int8, jnp.uint8) for x in jax.tree.leaves(field.code))
        # Seven matrices and two tables, in one or in two moments; norms stay as they are.
        assert codes == (7 + 2 * 2 if type == "muon" else 2 * 9)


def is_quantized(node):
    return isinstance(node, Quantized)


def matched(tree, specs):
    return jax.tree.map(lambda _, spec: spec, tree, match_weights(tree, specs))


NARROW = [pytest.param(name, marks=pytest.mark.full) for name in ("bfloat16", "int8")]


@pytest.mark.parametrize("moments", NARROW)
def test_losses_stay_near_those_of_float32(moments):
    want, _ = train("float32", 30)
    got, _ = train(moments, 30)
    assert want[-3:].mean() < want[:3].mean() - 0.5  # it learns
    np.testing.assert_allclose(got, want, atol=0.05)


@pytest.mark.full
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"pipe": 2, "fsdp": 2}], ids=str)
def test_the_mesh_changes_nothing(mesh):
    """Up to what float32 sums in another order: a code that falls on the other side of a step."""
    np.testing.assert_allclose(train("int8", 8, **mesh)[0], train("int8", 8)[0], atol=2e-3)


@pytest.mark.parametrize("moments", NARROW)
def test_checkpoints_move_between_mesh_and_pipeline(moments, tmp_path):
    _, state = train(moments, 2, fsdp=4, tensor=2)
    with Checkpointer(tmp_path) as saved:
        saved.save(2, state, {})
    model, tx, place = build(moments, pipe=2, fsdp=2)
    abstract, live = abstract_canonical(model, tx, place), abstract_state(model, tx, place)
    with Checkpointer(tmp_path) as again:
        restored = again.restore(abstract)
    packed = jax.jit(model.live, out_shardings=jax.tree.map(lambda a: a.sharding, live))(restored.state)
    back = jax.jit(model.canonical)(packed)
    for (path, a), b in zip(tree_leaves_with_path(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def updated(moments, opt_state=None):
    """Two weights after an update from `opt_state`, by default the first."""
    w = {"w": weight((64, 128), ("embed", "mlp")), "norm": weight((128,), (None,))}
    tx = optimizer("adamw", w, lr=1e-3, moments=moments)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), w)

    @quick
    def run(params, opt_state):
        return tx.update(params, opt_state, params)[1]

    state = run(params, tx.init(params) if opt_state is None else opt_state)
    return {"params": params, "opt_state": jax.block_until_ready(state)}


@pytest.mark.parametrize(("saved", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_moments_of_another_dtype_are_cast_where_asked_for(saved, wanted, tmp_path):
    state, like = updated(saved), updated(wanted)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        dtypes = rf"dtype: opt_state\.\S*mu\.w {saved} != {wanted} \(checkpoint.cast=true converts it\)"
        with pytest.raises(UserError, match=dtypes):
            checkpointer.restore(like)
        restored = checkpointer.restore(like, cast=True).state
    for old, new, leaf in zip(*map(jax.tree.leaves, (state, restored, like)), strict=True):
        assert new.dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old.astype(leaf.dtype)))
    after = updated(wanted, restored["opt_state"])["opt_state"]
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, like["opt_state"])
    assert all(np.isfinite(np.asarray(a, "f4")).all() for a in jax.tree.leaves(after))


@pytest.mark.parametrize(
    ("saved", "wanted", "go_on"),
    [("float32", "int8", "without"), ("bfloat16", "int8", "without"), ("int8", "float32", "with")],
)
def test_8_bit_moments_cannot_be_converted(saved, wanted, go_on, tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, updated(saved), {})
        with pytest.raises(UserError, match=rf"(?s)missing: opt_state.*: continue {go_on} optimizer.moments=int8, or "):
            checkpointer.restore(updated(wanted), cast=True)


def test_bfloat16_weights_may_have_float32_moments():
    model, tx, place = build("float32", dtype=jnp.bfloat16)
    state = abstract_state(model, tx, place)
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.bfloat16.dtype}
    assert {a.dtype for a in jax.tree.leaves(state.opt_state)} == {jnp.float32.dtype, jnp.int32.dtype}
    after = jax.eval_shape(make_train_step(model, tx, place), state, tiny.batch())[0]
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)


@pytest.mark.parametrize(("type", "moments"), [("lion", "int8"), ("adafactor", "bfloat16"), ("optax.lamb", "int8")])
def test_other_optimizers_keep_theirs_so_too(type, moments):
    w = {"w": weight((64, 128), ("embed", "mlp")), "norm": weight((128,), (None,))}
    tx = optimizer(type, w, lr=1e-3, moments=moments)
    params = jax.tree.map(lambda w: jnp.ones(w.shape), w)

    @quick
    def run(params):
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        return updates, state, after

    updates, state, after = run(params)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
    assert any(a.dtype in (jnp.bfloat16, jnp.int8) for a in jax.tree.leaves(state))
    assert all(np.isfinite(u).all() and (np.asarray(u) != 0).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("type", "moments", "message"),
    [
        ("adamw", "int4", "moments = int4: must be one of float32, bfloat16, int8"),
        ("sgd", "int8", "keeps no mu or trace or nu or v"),
        ("optax.rmsprop", "bfloat16", "with a count of its updates"),
    ],
)
def test_mistakes_are_named(type, moments, message):
    with pytest.raises(UserError, match=message):
        optimizer(type, {"w": weight((64, 128), ("embed", "mlp"))}, lr=0.1, moments=moments)
