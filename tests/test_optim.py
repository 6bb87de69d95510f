"""Optimizers: roles, stacked layers, clipping, state shardings, and errors that help."""

import dataclasses
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.optim import OPTIMIZERS, global_norm, optimizer, state_shardings
from shardtrain.weights.layout import match_weights
from shardtrain.weights.weight import Weight

# L layers, X experts (stack dims), V vocab, D embed, H heads, K head_dim, F mlp
L, X, V, D, H, K, F = 2, 2, 16, 8, 4, 4, 8
FAST = {"xla_backend_optimization_level": 0}  # compiling is what takes the time here
MUON = optax.contrib.MuonDimensionNumbers


def weight(shape, role, stack=0, inputs=0):
    return Weight(
        shape,
        jnp.float32,
        (("layers",) if stack else ()) + (None,) * (len(shape) - bool(stack)),
        role,
        stack,
        inputs,
    )


WEIGHTS = {
    "embed": weight((V, D), "embedding"),
    "blocks": {
        "norm": weight((L, D), "norm", 1),
        "query": weight((L, D, H, K), "matrix", 1, 1),
        "up": weight((L, D, F), "matrix", 1, 1),  # square
        "experts": weight((L, X, D, 2 * F), "matrix", 2, 1),
        "router": weight((L, D, X), "router", 1, 1),
    },
    "norm": weight((D,), "norm"),
    "head": weight((D, V), "head", 0, 1),
}
DECAYED = ("embed", "query", "up", "experts", "router", "head")
# Hand-written for the unstacked tree, without a look at Weight.
MATRICES = {"query": MUON((0,), (1, 2)), "up": MUON((0,), (1,)), "experts": MUON((0,), (1,))}


def draw(seed, scale=1.0):
    leaves, treedef = jax.tree.flatten(WEIGHTS)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=w.shape) * scale, w.dtype) for w in leaves])


def unstack(tree):
    """`[L, ...]` and `[L, X, ...]` leaves as dicts of separate arrays."""

    def apart(w, x):
        x = jnp.asarray(x)
        for _ in range(w.stack):
            x = jax.tree.map(lambda a: {str(i): a[i] for i in range(a.shape[0])}, x)
        return x

    return jax.tree.map(apart, WEIGHTS, tree)


def name_of(path):
    """The name of an unstacked weight: its last key that is not a layer number."""
    return [entry.key for entry in path if not entry.key.isdigit()][-1]


def by_name(fn, params):
    return jax.tree_util.tree_map_with_path(lambda path, _: fn(name_of(path)), params)


decays = partial(by_name, DECAYED.__contains__)
LR = optax.linear_schedule(0.02, 0.01, 5)
WD = 0.3


def decoupled(tx):
    return optax.chain(tx, optax.add_decayed_weights(lambda count: -WD * LR(count), decays))


muon = partial(optax.contrib.muon, muon_weight_dimension_numbers=partial(by_name, MATRICES.get))


def schedule_free(scale):
    base = optax.chain(scale, optax.add_decayed_weights(WD, decays), optax.scale_by_learning_rate(LR))
    return optax.contrib.schedule_free(base, LR)


# type, options, and the same optimizer from plain optax, for the unstacked tree
CASES = {
    "adamw": ("adamw", {"b2": 0.95}, optax.adamw(LR, b2=0.95, weight_decay=WD, mask=decays)),
    "lion": ("lion", {}, optax.lion(LR, weight_decay=WD, mask=decays)),
    "sgd": ("sgd", {"momentum": 0.9, "nesterov": True}, decoupled(optax.sgd(LR, 0.9, True))),
    "adafactor": (  # norm and router are too small to be factored
        "adafactor",
        {"min_dim_size_to_factor": 4, "momentum": 0.9},
        decoupled(optax.adafactor(LR, min_dim_size_to_factor=4, momentum=0.9)),
    ),
    "muon": ("muon", {"ns_steps": 3}, decoupled(muon(LR, ns_steps=3))),
    "muon-adaptive": (
        "optax.contrib.muon",
        {"adaptive": True, "consistent_rms": 0.2, "ns_steps": 2},
        decoupled(muon(LR, adaptive=True, consistent_rms=0.2, ns_steps=2)),
    ),
    "schedule-free": (
        "schedule_free_adamw",
        {},
        schedule_free(optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)),
    ),
    "schedule-free-sgd": ("schedule_free_sgd", {}, schedule_free(optax.identity())),
    "lamb": ("optax.lamb", {"b1": 0.8}, optax.lamb(LR, b1=0.8, weight_decay=WD, mask=decays)),
    "novograd": ("optax:novograd", {}, decoupled(optax.novograd(LR))),  # a scalar per weight as state
}
SLOW = ("muon-adaptive",)
NAMES = [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name for name in CASES]
assert set(OPTIMIZERS) <= {type for type, _, _ in CASES.values()}


def run(tx, params, grads):
    """Params after one update for each of `grads`, and the final state."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    def train(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    return jax.jit(train, compiler_options=FAST)(params, jax.tree.map(lambda *g: jnp.stack(g), *grads))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("case", NAMES)
def test_stacked_layers_update_as_separate_weights_would(case):
    type, options, apart = CASES[case]
    params, grads = draw(0), [draw(s, scale) for s, scale in ((1, 1.0), (2, 0.1), (3, 3.0))]
    tx = optimizer(type, WEIGHTS, lr=LR, weight_decay=WD, clip_norm=1.0, **options)
    stacked, state = run(tx, params, grads)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), apart)
    separate, _ = run(clipped, unstack(params), [unstack(g) for g in grads])
    close(unstack(stacked), separate, rtol=2e-6, atol=1e-6)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


def test_elementwise_optimizers_may_be_told_to_go_layer_by_layer():
    params, grads = draw(0), [draw(1)]
    one, _ = run(optimizer("adamw", WEIGHTS, lr=LR, per_layer=True), params, grads)
    other, _ = run(optimizer("adamw", WEIGHTS, lr=LR), params, grads)
    close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("type", [*OPTIMIZERS, "optax.lamb", "optax.adam"])
def test_decay_follows_the_role_and_never_ndim(type):
    params, zeros = draw(0), jax.tree.map(jnp.zeros_like, draw(0))
    roles = ("head",) if type == "sgd" else ("matrix", "embedding", "head", "router")
    tx = optimizer(type, WEIGHTS, lr=0.1, weight_decay=0.5, decay_roles=roles)
    moved, _ = run(tx, params, [zeros])
    changed = jax.tree.map(lambda a, b: not np.allclose(a, b, rtol=1e-5), params, moved)  # schedule-free ones round
    # The stacked norm [L, D] has ndim 2 and stays.
    assert changed == jax.tree.map(lambda w: w.role in roles, WEIGHTS)


def test_muon_takes_matrices_by_role_and_decays_each_half_at_its_own_rate():
    params, zeros = draw(0), jax.tree.map(jnp.zeros_like, draw(0))
    tx = optimizer("muon", WEIGHTS, lr=0.1, weight_decay=0.5, adam_learning_rate=0.01)
    moved, state = run(tx, params, [zeros])
    rate = {"matrix": 0.1, "norm": 0.0}
    expected = jax.tree.map(lambda w, p: p * (1 - 0.5 * rate.get(w.role, 0.01)), WEIGHTS, params)
    close(moved, expected, rtol=1e-6, atol=0)
    inner = state[0].inner_states
    assert len(jax.tree.leaves(inner["muon"].inner_state[0].mu)) == 3  # query, up, experts
    assert len(jax.tree.leaves(inner["adam"].inner_state[0].mu)) == 5


def test_muon_orthogonalises_each_layer():
    zeros = jax.tree.map(jnp.zeros_like, draw(0))
    updates, _ = run(optimizer("muon", WEIGHTS, lr=1.0, ns_steps=12), zeros, [draw(1)])
    for matrices, cols in (("query", H * K), ("up", F)):
        for m in np.asarray(updates["blocks"][matrices]).reshape(L, D, cols) / max(1, cols / D) ** 0.5:
            values = np.linalg.svd(m, compute_uv=False)
            assert 0.5 < values.min() <= values.max() < 1.5, matrices


def test_the_clip_scales_all_weights_by_one_factor_and_holds_no_state():
    params, grads = draw(0), draw(1, 5.0)
    tx = optimizer("sgd", WEIGHTS, lr=1.0, clip_norm=0.7)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, _ = optax.clip_by_global_norm(0.7).update(unstack(grads), optax.EmptyState())
    close(unstack(updates), jax.tree.map(jnp.negative, expected), rtol=1e-6, atol=0)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.7, rel=1e-5)
    free = optimizer("sgd", WEIGHTS, lr=1.0)
    assert jax.tree.structure(state) == jax.tree.structure(free.init(params))
    small = jax.tree.map(lambda g: g * 1e-3, grads)
    close(jax.jit(tx.update)(small, state, params)[0], jax.tree.map(jnp.negative, small), rtol=0, atol=0)


# Shardings: 8 devices, fsdp 4 x tensor 2; all dims divide.
SPECS = {
    "embed": P("tensor", "fsdp"),
    "blocks": {
        "norm": P(),
        "query": P(None, "fsdp", "tensor"),
        "up": P(None, "fsdp", "tensor"),
        "experts": P(None, None, "fsdp", "tensor"),
        "router": P(None, "fsdp", None),
    },
    "norm": P(),
    "head": P("fsdp", "tensor"),
}


@pytest.fixture(scope="module")
def placed():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), draw(0), SPECS)


def abstract(params):
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)


@pytest.mark.parametrize("case", NAMES)
def test_state_inherits_the_sharding_of_its_weight(case, placed):
    type, options, _ = CASES[case]
    tx = optimizer(type, WEIGHTS, lr=LR, weight_decay=WD, clip_norm=1.0, **options)
    derived = state_shardings(tx, abstract(placed), WEIGHTS)
    assert jax.tree.structure(derived) == jax.tree.structure(jax.eval_shape(tx.init, placed))

    def init_and_update(params):
        state = tx.init(params)
        return state, tx.update(params, state, params)[1]

    state, after = jax.jit(init_and_update, compiler_options=FAST, out_shardings=(derived, derived))(placed)
    for kept in (state, after):
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), kept, derived)
        assert all(jax.tree.leaves(same))
    specs = match_weights(state, SPECS)
    for x, w, spec in zip(
        *map(
            partial(jax.tree.leaves, is_leaf=lambda n: n is None),
            (state, match_weights(state, WEIGHTS), specs),
        ),
        strict=True,
    ):
        if w is not None and x.shape == w.shape and w.role != "norm":
            assert x.sharding.spec == spec
            assert not x.sharding.is_fully_replicated
            assert x.addressable_shards[0].data.size < x.size


def test_adam_moments_are_never_replicated(placed):
    tx = optimizer("adamw", WEIGHTS, lr=LR)
    derived = state_shardings(tx, abstract(placed), WEIGHTS)
    assert jax.tree.map(lambda s: s.spec, derived[0].mu) == SPECS
    assert jax.tree.map(lambda s: s.spec, derived[0].nu) == SPECS
    assert derived[0].count.is_fully_replicated


def test_adafactor_rows_and_columns_keep_the_axis_of_the_dim_that_they_hold():
    """Which dim of the weight a dim of the state holds is read off how the state varies, not off its shape."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    shapes = [(8, 8), (8, 16), (16, 8), (8, 8, 8), (8, 16, 8), (16, 16, 8), (8, 4, 8), (8, 16, 16)]
    weights = {f"{s}{k}": weight((2,) * k + s, "matrix", k, 1) for s in shapes for k in (0, 1)}

    def abstract(w):
        spec = P(*(None,) * w.stack, *("a", "b", "c")[: len(w.shape) - w.stack])
        return jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(mesh, spec))

    tx = optimizer("adafactor", weights, lr=0.1, min_dim_size_to_factor=4)
    derived = state_shardings(tx, jax.tree.map(abstract, weights), weights)[0]
    ones = jax.tree.map(lambda w: jnp.ones(w.shape), weights)
    update = jax.jit(lambda grads: tx.update(grads, tx.init(ones), ones)[1][0])
    for dim, axis in enumerate(("a", "b", "c")):

        def ramp(w, dim=dim):
            at = w.stack + dim
            return jnp.ones(w.shape) if at >= len(w.shape) else jax.lax.broadcasted_iota(jnp.float32, w.shape, at)

        state = update(jax.tree.map(ramp, weights))
        for name, w in weights.items():
            for leaf, where in (
                (state.v_row[name], derived.v_row[name]),
                (state.v_col[name], derived.v_col[name]),
            ):
                assert leaf.ndim == len(w.shape) - 1
                varying = [where.spec[d] for d in range(leaf.ndim) if np.ptp(leaf, axis=d).max() > 0.01]
                assert varying == ([axis] if axis in where.spec else []), name
        assert {axis for s in derived.v_row.values() for axis in s.spec} >= {"a", "b"}


def test_state_that_does_not_follow_its_weight_is_refused(placed):
    params = abstract(placed)
    memory = optax.GradientTransformation(
        lambda p: {"m": jax.tree.map(lambda x: jnp.zeros((5, *x.shape)), p)}, lambda g, s, p=None: (g, s)
    )
    with pytest.raises(UserError, match=r"state m\.blocks\.experts of shape \(5, 2, 2, 8, 16\) cannot be laid out"):
        state_shardings(memory, params, WEIGHTS)
    pool = optax.GradientTransformation(lambda p: jnp.zeros((64, 64)), lambda g, s, p=None: (g, s))
    with pytest.raises(UserError, match=r"\(64, 64\) belongs to no weight"):
        state_shardings(pool, params, WEIGHTS)
    means = optax.GradientTransformation(
        lambda p: {"m": jax.tree.map(lambda x: jnp.zeros(x.shape[:-1]), p)}, lambda g, s, p=None: (g, s)
    )
    square = {"w": weight((8, 8), "matrix", 0, 1)}
    where = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=placed["head"].sharding)}
    with pytest.raises(UserError, match="more than one choice of its dims fits"):
        state_shardings(means, where, square)


@pytest.mark.parametrize(
    ("type", "options", "message"),
    [
        ("adamW", {}, "did you mean adamw"),
        ("xyzzy", {}, "use one of adamw, lion, sgd, adafactor, muon.*import path"),
        ("optax.lam", {}, "optax has no factory 'lam'; did you mean lamb"),
        ("no_such_package:opt", {}, "importing module 'no_such_package' fails"),
        ("optax.scale_by_adam", {}, "takes no learning_rate"),
        ("adamw", {"beta1": 0.9}, r"beta1 = 0.9: adamw has no such option; use one of b1, b2"),
        ("adamw", {"epsilon": 1e-8}, "epsilon = 1e-08: adamw has no such option; did you mean eps"),
        ("optax.lamb", {"eps_rot": 0.0}, "did you mean eps_root"),
        (
            "adafactor",
            {"weight_decay_rate": 0.1},
            "weight_decay_rate follows from weight_decay and decay_roles",
        ),
        ("muon", {"muon_weight_dimension_numbers": None}, "follows from the roles"),
        ("muon", {"ns_coeffs": "fast"}, "optimizer muon with options .*fast"),
        (
            "adamw",
            {"b1": "abc"},
            "optimizer.options.b1 = abc: must be a number, not 'abc'; its default is 0.9",
        ),
        ("adamw", {"b1": None}, "optimizer.options.b1: must be a number, not None"),
        ("schedule_free_adamw", {"b1": 0}, r"options.b1 = 0: must be above 0 and below 1; its default is 0.9"),
        ("optax.contrib.schedule_free_sgd", {"b1": 1.0}, "options.b1 = 1.0: must be above 0 and below 1"),
        ("adamw", {"clip_norm": "a"}, "clip_norm = a: must be a number or None, not 'a'"),
        ("sgd", {"lr": -0.1}, "lr = -0.1: must be a positive number"),
        ("sgd", {"clip_norm": 0.0}, "clip_norm = 0.0: must be a positive number"),
        ("sgd", {"weight_decay": -1.0}, "weight_decay = -1.0: must be a number of 0 or more"),
        ("sgd", {"decay_roles": ["matrx"]}, "matrx: there is no such role; did you mean matrix"),
        ("muon", {"per_layer": False}, "mix the layers of a stack"),
        ("optax.contrib.dog", {}, "combines weights"),
        ("optax.noisy_sgd", {"key": 0}, "random key"),
        ("optax.contrib.momo", {}, "fails on this model"),  # wants the loss
    ],
)
def test_mistakes_name_the_value_and_the_fix(type, options, message):
    with pytest.raises(UserError, match=message):
        optimizer(type, WEIGHTS, **({"lr": 0.1} | options))


def test_muon_refuses_a_matrix_without_input_dims():
    with pytest.raises(UserError, match=r"matrix a\.kernel of shape \(4, 4\).*declare `inputs`"):
        optimizer("muon", {"a": {"kernel": weight((4, 4), "matrix")}}, lr=0.1)


def test_a_schedule_free_optimizer_refuses_weights_that_would_round_its_average_away():
    narrow = {"a": weight((4,), "norm"), "b": dataclasses.replace(weight((4,), "norm"), dtype=jnp.bfloat16)}
    message = "type = schedule_free_sgd: its average would be lost .* bfloat16.*set precision.params to float32"
    with pytest.raises(UserError, match=message):
        optimizer("schedule_free_sgd", narrow, lr=0.1, moments="float32")


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("an_own_module")
    monkeypatch.setitem(sys.modules, "an_own_module", module)
    return module


def test_a_factory_of_ones_own(own_module):
    own_module.scaled = lambda learning_rate, factor: optax.chain(optax.scale(factor), optax.sgd(learning_rate))
    tx = optimizer("an_own_module:scaled", WEIGHTS, lr=0.5, factor=3.0)
    params, grads = draw(0), draw(1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    close(updates, jax.tree.map(lambda g: -1.5 * g, grads), rtol=1e-6, atol=0)
    with pytest.raises(UserError, match=r"required .* 'factor'"):
        optimizer("an_own_module:scaled", WEIGHTS, lr=0.5)


def test_a_factory_that_couples_weights_works_when_told_so(own_module):
    own_module.normed = lambda learning_rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(learning_rate))
    with pytest.raises(UserError, match="set per_layer to false"):
        optimizer("an_own_module:normed", {k: WEIGHTS["blocks"][k] for k in ("query", "up")}, lr=1.0)
    tx = optimizer("an_own_module:normed", WEIGHTS, lr=1.0, per_layer=False)
    params = draw(0)
    updates, _ = jax.jit(tx.update)(draw(1), tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)


def test_the_clip_of_bfloat16_gradients_is_computed_in_float32():
    grads = {"a": jnp.full((1000,), 0.011, jnp.bfloat16), "b": jnp.full((3,), 3.3, jnp.bfloat16)}
    weights = {name: Weight(g.shape, g.dtype, (None,), "matrix") for name, g in grads.items()}
    tx = optimizer("sgd", weights, lr=1.0, clip_norm=0.7)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    wide = {name: np.asarray(g, np.float64) for name, g in grads.items()}
    norm = np.sqrt(sum((g**2).sum() for g in wide.values()))
    assert global_norm(grads).dtype == jnp.float32
    assert float(global_norm(grads)) == pytest.approx(norm, rel=1e-6)
    for name, g in wide.items():
        np.testing.assert_array_equal(updates[name], jnp.asarray(-g / norm * 0.7, jnp.bfloat16))


def test_what_an_optimizer_is_given():
    weights = {"w": weight((4, 4), "matrix", inputs=1)}
    for call, message in (
        (
            lambda: optimizer(optax.adamw, weights, lr=0.1),
            "type = .*: must be text, not a function; give one",
        ),
        (
            lambda: optimizer("adamw", object(), lr=0.1),
            "weights is an object, but must be a Weight; pass model.weights",
        ),
        (lambda: optimizer("adamw", {}, lr=0.1), "weights is None, but must be a Weight; pass model.weights"),
        (
            lambda: optimizer("adamw", weights, lr="0.1"),
            "lr = 0.1: must be .*a function.* or a number, not '0.1'; give one",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()
