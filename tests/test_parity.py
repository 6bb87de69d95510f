"""The heart: every parallelism, alone and combined, equals the single-device run, and that one a hand-written model."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import floor
import tiny
from shardtrain.sharding import use
from shardtrain.train.gradients import Gradients
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_train_step

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2},
    "data x fsdp": {"data": 4, "fsdp": 2},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "island x data x expert": {"island": 2, "data": 2, "expert": 2},
    "context x tensor": {"context": 4, "tensor": 2},
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
WAYS = list(itertools.product((1, 2), ("none", "full"), (True, False)))  # accumulate, remat, scan
# Every mesh, every way and both dtypes occur here; the rest of the product runs under `-m full`.
REFERENCE = (1, "none", True)
QUICK = [(mesh, *WAYS[(i + 1) % len(WAYS)], ("float64", "float32")[i % 2]) for i, mesh in enumerate(MESHES)]
ALL = [
    (mesh, *way, dtype) for mesh in MESHES for way in WAYS for dtype in TOLERANCE if (mesh, way) != ("one", REFERENCE)
]


@cache
def fresh(dtype: str):
    """A state on the host, drawn once: `test_state.py` shows that its bits are those of any mesh."""
    model = tiny.llama(jnp.dtype(dtype))
    return jax.device_get(init_state(model, optax.sgd(0.1), tiny.partitioner(), seed=3))


def gradients(mesh: str, accumulate: int, remat: str, scan: bool, dtype: str):
    """Loss, metrics and all gradients of one step with dropout."""
    place = tiny.partitioner(**MESHES[mesh])
    chunk = None if remat == "none" else 4  # of the loss, for half of the cases
    model = tiny.llama(jnp.dtype(dtype), remat=remat, scan=scan, dropout=0.1, z_loss=1e-3, loss_chunk=chunk)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optax.sgd(0.1), place))
    state = jax.device_put(fresh(dtype), shardings)

    @jax.jit
    def run(state, batch):
        with use(place):
            gradients = Gradients(model, place, accumulate=accumulate, reduce_dtype=jnp.dtype(dtype))
            return gradients(state, batch, jax.random.key(7))[:2]

    grads, sums = run(state, tiny.batch(place))
    return jax.tree.map(np.asarray, (sums, grads))


@cache
def single_device(dtype: str):
    return gradients("one", *REFERENCE, dtype)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=" ".join(map(str, c)), marks=() if c in QUICK else pytest.mark.full) for c in ALL],
)
def test_one_step_equals_the_single_device_step(case):
    dtype = case[-1]
    with jax.enable_x64(dtype == "float64"):
        got, want = gradients(*case), single_device(dtype)
    assert all(np.asarray(g).dtype == dtype for g in jax.tree.leaves(got[1]))
    assert tiny.relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.full
@pytest.mark.parametrize("remat", ["names:query,mlp_up", "offload:attn_out,mlp_gate"])
@pytest.mark.parametrize("mesh", ["one", "data x fsdp x tensor"])
def test_activations_kept_by_name_change_nothing(mesh, remat):
    with jax.enable_x64(True):
        got, want = gradients(mesh, 1, remat, True, "float64"), single_device("float64")
    assert tiny.relative_error(got, want) < TOLERANCE["float64"]


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_single_device_step_equals_a_hand_written_one(scan):
    with jax.enable_x64(True):
        place, model = tiny.partitioner(), tiny.llama(jnp.float64, scan=scan)
        state = init_state(model, optax.sgd(0.1), place)
        batch = tiny.batch()
        shape = floor.Shape(**tiny.SIZES)
        want = jax.value_and_grad(floor.loss_fn)(floor.from_library(state.params), batch, shape, remat=False)
        grads, sums, _ = jax.jit(
            lambda s, b: Gradients(model, place, reduce_dtype=jnp.float64)(s, b, jax.random.key(0))
        )(state, batch)
        total, weight = sums["loss"]
        assert tiny.relative_error((total / weight, floor.from_library(grads)), want) < 1e-12


@cache
def curve(mesh: str, accumulate: int = 1) -> np.ndarray:
    """The losses of 50 training steps on changing batches, with dropout, clipping and decay."""
    from shardtrain.optim import optimizer

    place, model = tiny.partitioner(**MESHES[mesh]), tiny.llama(dropout=0.1)
    tx = optimizer("adamw", model.weights, lr=3e-3, clip_norm=1.0, weight_decay=0.1)
    state = init_state(model, tx, place, seed=1)
    step = make_train_step(model, tx, place, seed=5, accumulate=accumulate)
    losses = []
    for i in range(50):
        state, metrics = step(state, tiny.batch(place, seed=i % 5))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [(mesh, n) for mesh in MESHES for n in (1, 2) if (mesh, n) != ("one", 1)],
)
def test_fifty_steps_follow_the_single_device_curve(mesh, accumulate):
    want = curve("one")
    assert want[-5:].mean() < want[:5].mean() - 0.2  # it learns, so the curves have something to differ in
    np.testing.assert_allclose(curve(mesh, accumulate), want, atol=1e-4)
