"""Frozen weights: no gradient, no optimizer state, no decay, no change; on every mesh, and over a resume."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from commands import assert_same_bits, compiled_once, fit, losses, train  # noqa: F401
from shardtrain import UserError
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import init_state
from shardtrain.train.step import make_train_step
from shardtrain.weights.paths import flatten
from shardtrain.weights.trained import merged, trained

FREEZE = ("embedding", "*.attention", "role:norm")
SIZES = {**tiny.SIZES, "n_layers": 4}


def llama(schedule=None, backward="remat", freeze=FREEZE, dtype=jnp.float64, **options) -> ModelDef:
    return ModelDef(
        lambda rngs: Llama(**SIZES, precision=Precision(dtype, dtype, dtype), rngs=rngs),
        schedule=schedule,
        backward=backward,
        freeze=freeze,
        **options,
    )


def two_steps(model: ModelDef, sizes: dict, accumulate: int = 1, gather: str = "tick"):
    """The canonical params before and after two steps of AdamW with decay and clipping, the metrics, and the state."""
    place = tiny.partitioner(**sizes)
    tx = optimizer("adamw", model.weights, lr=0.01, clip_norm=0.1, weight_decay=0.1)
    state = init_state(model, tx, place)
    before = jax.device_get(model.canonical(state.params))
    step = make_train_step(model, tx, place, accumulate=accumulate, gather=gather, reduce_dtype=jnp.float64)
    for seed in range(2):
        state, metrics = step(state, tiny.batch(place, seed=seed))
    after = jax.device_get(model.canonical(state.params))
    return before, after, {n: float(metrics[n]) for n in ("loss", "grad_norm")}, jax.device_get(state.opt_state)


@cache
def one_device():
    with jax.enable_x64(True):
        return two_steps(llama(), {})


def test_frozen_weights_stay_and_have_no_state():
    before, after, _, opt_state = one_device()
    moved = {path for path, leaf in flatten(after).items() if (leaf != flatten(before)[path]).any()}
    mlp = {f"blocks.layer.mlp.{name}.weight" for name in ("gate", "up", "down")}
    assert moved == {*mlp, "unembedding.weight"}
    held = {path.removeprefix("0.mu.") for path in flatten(opt_state) if path.startswith("0.mu.")}
    assert held == moved


def test_the_others_train_as_if_the_frozen_ones_were_masked_by_hand():
    """Against optax.masked over the whole gradient: the norm that clips is that of what trains."""
    with jax.enable_x64(True):
        place, whole = tiny.partitioner(), llama(freeze=())
        marks = jax.tree.map(lambda w: w.trains, llama().weights)
        frozen = jax.tree.map(lambda t: not t, marks)
        tx = optax.chain(
            optax.masked(optax.set_to_zero(), frozen),
            optax.clip_by_global_norm(0.1),
            optax.masked(
                optax.adamw(0.01, weight_decay=0.1, mask=jax.tree.map(lambda w: w.role != "norm", whole.weights)), marks
            ),
        )
        state = init_state(whole, tx, place)
        step = make_train_step(whole, tx, place)
        for seed in range(2):
            state, _ = step(state, tiny.batch(place, seed=seed))
        assert tiny.relative_error(one_device()[1], state.params) < 1e-12


PIPES = {
    "remat": ("1f1b", "remat", "tick"),
    "save": ("1f1b", "save", "tick"),
    "split": ("zb_h1", "remat", "tick"),
    "gather once": ("1f1b", "remat", "step"),
}


MESHES = [
    ({"data": 4, "fsdp": 2}, 2),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("sizes", "accumulate"), MESHES, ids=str)
def test_a_mesh_changes_nothing(sizes, accumulate):
    with jax.enable_x64(True):
        got = two_steps(llama(), sizes, accumulate)
        assert tiny.relative_error(got[1:3], one_device()[1:3]) < 1e-12


@pytest.mark.full
@pytest.mark.parametrize("way", PIPES)
def test_a_pipeline_changes_nothing(way):
    name, backward, gather = PIPES[way]
    with jax.enable_x64(True):
        model = llama(schedules.make(name, 2, 4), backward)
        got = two_steps(model, {"pipe": 2, "fsdp": 2}, gather=gather)
        assert tiny.relative_error(got[1:3], one_device()[1:3]) < 1e-12


@pytest.mark.full
def test_a_pipeline_trains_the_head_alone():
    with jax.enable_x64(True):
        trains = {"freeze": (), "trains": ("unembedding",)}
        want = two_steps(llama(**trains), {})
        got = two_steps(llama(schedules.make("1f1b", 2, 4), **trains), {"pipe": 2})
        assert tiny.relative_error(got[1:3], want[1:3]) < 1e-12


def test_the_matmuls_of_frozen_gradients_are_not_in_the_program():
    def flops(freeze) -> float:
        place, model = tiny.partitioner(), llama(freeze=freeze, dtype=jnp.float32)
        tx = optimizer("sgd", model.weights, lr=0.1)
        lowered = make_train_step(model, tx, place).lower(init_state(model, tx, place), tiny.batch(place))
        return lowered.compile().cost_analysis()["flops"]

    size = (
        sum(w.size for p, w in flatten(llama(freeze=(), dtype=jnp.float32).weights).items() if ".mlp." in p)
        / SIZES["n_layers"]
    )
    tokens = tiny.ROWS * tiny.LENGTH
    saved = flops(()) - flops(("*.mlp",))  # XLA counts the body of the loop over layers once
    assert saved == pytest.approx(2 * size * tokens, rel=0.05)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"freeze": ["embeding"]},
            r"optimizer.freeze = embeding: matches no weight of this model; did you mean embedding",
        ),
        ({"trains": ["role:norms"]}, "optimizer.trains = role:norms: matches no weight.*did you mean role:norm"),
        ({"freeze": ["blocks.layer.3"]}, "matches no weight"),
        ({"freeze": ["*"]}, "no weight is left to train"),
        ({"freeze": "embedding"}, "must be a list of patterns"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, message):
    with pytest.raises(UserError, match=message):
        llama(**{"freeze": (), "dtype": jnp.float32, **patterns})


def test_trained_and_merged_are_inverse():
    weights = llama(dtype=jnp.float32).weights
    assert merged(trained(weights, weights), weights) == weights
    assert {w.trains for w in flatten(trained(weights, weights)).values()} == {True}


def test_a_run_with_frozen_weights_says_so_and_resumes(tmp_path):
    freeze = "optimizer.freeze=[embedding, role:norm]"
    whole = fit(tmp_path / "whole", freeze)
    fit(tmp_path / "run", freeze, stop_after=5)
    result = train(tmp_path / "run", freeze)
    assert result.code == 0, result.err
    assert "train (" in result.out
    assert "the others are frozen" in result.out
    assert losses(tmp_path / "run") == losses(whole.directory)
    assert "optimizer.freeze" in train(tmp_path / "run", "run.steps=13").err


@pytest.mark.full
def test_another_mesh_resumes_frozen_weights(tmp_path):
    freeze = "optimizer.freeze=[embedding, role:norm]"
    whole = fit(tmp_path / "whole", freeze)
    fit(tmp_path / "run", freeze, stop_after=5)
    fit(tmp_path / "run", freeze, "mesh={pipe: 2, fsdp: 4}", "pipeline.microbatches=2")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole.directory), rtol=1e-5)
