"""Layouts: whose leaf is whose, there and back, and training in a permuted, padded one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardtrain.errors import UserError
from shardtrain.optim import OPTIMIZERS, optimizer
from shardtrain.weights.layout import Layout, match_weights
from shardtrain.weights.weight import Weight

WEIGHTS = {
    "embed": Weight((16, 8), jnp.float32, ("vocab", "embed"), "embedding"),
    "blocks": {
        "norm": Weight((5, 8), jnp.float32, ("layers", "embed"), "norm", 1),
        "up": Weight((5, 8, 8), jnp.float32, ("layers", "embed", "mlp"), "matrix", 1, 1),
        "experts": Weight((5, 2, 8, 4), jnp.float32, ("layers", "experts", "embed", "mlp"), "matrix", 2, 1),
    },
}
# 5 layers on 2 chunks x 2 ranks x 2 slots, as a V-shaped schedule would place them, out of order, 3 slots empty
LAYOUT = Layout(5, (2, 2, 2), (0, 6, 3, 5, 4))
EMPTY = np.array([1, 2, 7])


def draw(seed):
    leaves, treedef = jax.tree.flatten(WEIGHTS)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=w.shape), w.dtype) for w in leaves])


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def padding(tree):
    """The empty slots of all live leaves that belong to a stack."""
    matched = match_weights(tree, WEIGHTS)
    stacked = [
        (x, w)
        for x, w in zip(jax.tree.leaves(tree), jax.tree.leaves(matched, is_leaf=lambda n: n is None), strict=True)
        if w and w.stack
    ]
    return [np.asarray(x).reshape(8, *x.shape[3:])[EMPTY] for x, _ in stacked]


def test_a_leaf_belongs_to_the_longest_path_that_ends_its_own():
    a, b = (Weight((2,), jnp.float32, (None,), "norm") for _ in range(2))
    weights = {"w": a, "x": {"w": b}, "count": a}
    tree = {"x": {"w": 0}, "w": 1, "y": {"x": {"w": 2}, "w": 3, "v": 4}, "s": [{"w": 5}, {"x": [6]}]}
    found = match_weights(tree, weights)
    assert found["x"]["w"] is b
    assert found["w"] is a
    assert found["y"]["x"]["w"] is b
    assert found["y"]["w"] is a
    assert found["y"]["v"] is None
    assert found["s"][0]["w"] is a
    assert found["s"][1]["x"] == [None]


def test_the_state_of_every_optimizer_finds_its_weights():
    for type in OPTIMIZERS:
        state = jax.eval_shape(optimizer(type, WEIGHTS, lr=0.1, weight_decay=0.1).init, draw(0))
        matched = match_weights(state, WEIGHTS)
        paths = jax.tree_util.tree_flatten_with_path(state)[0]
        for (path, leaf), found in zip(paths, jax.tree.leaves(matched, is_leaf=lambda n: n is None), strict=True):
            name = jax.tree_util.keystr(path)
            at = [key for key in ("embed", "norm", "up", "experts") if name.endswith(f"['{key}']")]
            expected = None if not at else WEIGHTS["embed"] if at == ["embed"] else WEIGHTS["blocks"][at[0]]
            assert found is expected, (type, name)
            assert expected is not None or leaf.size <= 3, (type, name)  # counts; muon's 3 coefficients


def test_pack_puts_each_layer_in_its_slot_and_zeros_elsewhere():
    tree = draw(0)
    live = LAYOUT.pack(tree, WEIGHTS)
    for name, x in live["blocks"].items():
        assert x.shape == (2, 2, 2, *tree["blocks"][name].shape[1:])
        assert x.dtype == tree["blocks"][name].dtype
        for layer, slot in enumerate(LAYOUT.slots):
            np.testing.assert_array_equal(x[np.unravel_index(slot, (2, 2, 2))], tree["blocks"][name][layer])
    assert live["embed"] is tree["embed"]
    assert len(padding(live)) == 3
    assert not any(empty.any() for empty in padding(live))


@pytest.mark.parametrize("layout", [LAYOUT, Layout(5, (1, 5, 1), (4, 3, 2, 1, 0)), Layout(5, (5,), (1, 0, 2, 4, 3))])
def test_round_trip_inside_and_outside_of_jit(layout):
    tree = draw(0)
    live = layout.pack(tree, WEIGHTS)
    same(layout.unpack(live, WEIGHTS), tree)
    same(jax.jit(lambda t: layout.pack(t, WEIGHTS))(tree), live)
    same(jax.jit(lambda t: layout.unpack(t, WEIGHTS))(live), tree)
    described = layout.live_weights(WEIGHTS)
    assert jax.tree.map(lambda w: w.shape, described) == jax.tree.map(lambda x: x.shape, live)


def test_live_weights_name_the_rank_dim_and_keep_role_inputs_and_the_rest():
    live = LAYOUT.live_weights(WEIGHTS)
    up, experts = live["blocks"]["up"], live["blocks"]["experts"]
    assert up == Weight(
        (2, 2, 2, 8, 8), jnp.float32, (None, "stages", None, "embed", "mlp"), "matrix", stack=3, inputs=1
    )
    assert (up.input_dims, up.output_dims) == ((3,), (4,))
    assert (experts.stack, experts.axes[3], experts.input_dims) == (4, "experts", (4,))
    assert live["embed"] is WEIGHTS["embed"]


CASES = [
    *((type, {}) for type in OPTIMIZERS if type not in ("sgd", "adafactor", "muon")),
    ("sgd", {"momentum": 0.9}),
    ("adafactor", {"min_dim_size_to_factor": 4, "momentum": 0.9}),
    ("muon", {"ns_steps": 3}),
    ("optax.lamb", {}),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (("adafactor", {}), ("muon", {"adaptive": True}))),
]


@pytest.mark.parametrize(("type", "options"), CASES)
def test_training_in_the_live_layout_equals_the_canonical_one(type, options):
    settings = {"lr": 0.02, "clip_norm": 1.0, "weight_decay": 0.1} | options

    def train(layout, params, grads):
        """Canonical params and gradients in; the live params and state, and the norms of the gradients, out."""
        tx = optimizer(type, layout.live_weights(WEIGHTS), **settings)

        def step(carry, g):
            params, state = carry
            g = layout.pack(g, WEIGHTS)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), optax.tree.norm(g)

        params = layout.pack(params, WEIGHTS)
        return jax.lax.scan(step, (params, tx.init(params)), grads)

    params, grads = draw(0), jax.tree.map(lambda *g: jnp.stack(g), *map(draw, (1, 2, 3)))
    fast = {"xla_backend_optimization_level": 0}  # compiling is what takes the time here
    canonical, norms = jax.jit(partial(train, Layout(5, (5,), (0, 1, 2, 3, 4))), compiler_options=fast)(params, grads)
    live, live_norms = jax.jit(partial(train, LAYOUT), compiler_options=fast)(params, grads)
    np.testing.assert_allclose(live_norms, norms, rtol=1e-6)
    assert len(padding(live[0])) == 3
    assert not any(empty.any() for empty in padding(live[0]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(live))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)

    jax.tree.map(close, LAYOUT.unpack(live, WEIGHTS), canonical)  # params and state
    packed = jax.eval_shape(partial(LAYOUT.pack, weights=WEIGHTS), canonical)
    assert jax.tree.map(jnp.shape, packed) == jax.tree.map(jnp.shape, live)


def test_mistakes():
    with pytest.raises(UserError, match="9 layers do not fit in 2 x 2 x 2 = 8 slots"):
        Layout(9, (2, 2, 2), tuple(range(9)))
    with pytest.raises(AssertionError):
        Layout(2, (2, 2, 2), (1, 1))
    with pytest.raises(AssertionError):
        Layout(2, (2, 2, 2), (1, 8))
    four = Layout(4, (2, 2, 1), (0, 1, 2, 3))
    with pytest.raises(UserError, match=r"blocks\.experts has shape \(5, 2, 8, 4\).*leading dims \(4,\)"):
        four.pack(draw(0), WEIGHTS)
    with pytest.raises(UserError, match=r"leading dims \(2, 2, 1\)"):
        four.unpack(draw(0), WEIGHTS)
