"""Averages of the weights: the formula, every mesh, checkpoints with and without one, and what evaluations use."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from commands import assert_same_bits, compiled_once, fit, losses, metrics, shardtrain  # noqa: F401
from shardtrain import UserError
from shardtrain.checkpoint import parameter_table
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.train.averages import averaged, start_ema
from shardtrain.train.evaluation import evaluate
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import init_state
from shardtrain.train.step import make_eval_step, make_train_step
from shardtrain.weights.trained import trained

STEPS, DECAY = 4, 0.3


def model_def(schedule=None, freeze=("embedding",)) -> ModelDef:
    base = tiny.llama(jnp.float64)
    return ModelDef(base.make, schedule=schedule, freeze=freeze)


def trajectory(model: ModelDef, sizes: dict, name: str = "sgd", ema: float | None = DECAY):
    """The canonical trained params after each step, and the live state at the end."""
    place = tiny.partitioner(**sizes)
    state = init_state(model, tx := optimizer(name, model.weights, lr=0.3), place)
    state = state if ema is None else start_ema(model, state)
    step, seen = make_train_step(model, tx, place, ema=ema), []
    for seed in range(STEPS):
        seen.append(params_of(model, state))
        state, _ = step(state, tiny.batch(place, seed=seed))
    return [*seen, params_of(model, state)], state, place


def params_of(model, state):
    return trained(jax.device_get(model.canonical(state.params)), model.canonical_weights)


@cache
def by_hand():
    with jax.enable_x64(True):
        seen, state, _ = trajectory(model_def(), {})
        average = seen[0]
        for t, params in enumerate(seen[1:]):
            d = min(DECAY, (1 + t) / (10 + t))
            average = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, average, params)
        return average, jax.device_get(state.ema)


def test_it_is_the_average_computed_by_hand():
    want, got = by_hand()
    assert tiny.relative_error(got, want) < 1e-12


MESHES = [{"fsdp": 2, "tensor": 2}, pytest.param({"pipe": 2, "data": 2}, marks=pytest.mark.full)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_it_is_the_same_on_every_mesh(sizes):
    with jax.enable_x64(True):
        model = model_def(schedules.make("1f1b", 2, 4) if "pipe" in sizes else None)
        _, state, _ = trajectory(model, sizes)
        live = jax.tree.map(lambda a: a.sharding, trained(state.params, model.weights))
        assert jax.tree.map(lambda a: a.sharding, state.ema) == live
        assert tiny.relative_error(model.canonical(state.ema), by_hand()[0]) < 1e-12


def test_a_schedule_free_optimizer_is_evaluated_at_its_average():
    with jax.enable_x64(True):
        model = model_def()
        _, state, place = trajectory(model, {"fsdp": 2}, "schedule_free_adamw", ema=None)
        x = optax.contrib.schedule_free_eval_params(state.opt_state, trained(state.params, model.weights))
        eval_step, batch = make_eval_step(model, place), tiny.batch(place)
        got = averaged(model, state)
        assert tiny.relative_error(trained(got.params, model.weights), x) < 1e-12
        assert evaluate(eval_step, got, [batch])["loss"] != evaluate(eval_step, state, [batch])["loss"]


def test_a_schedule_free_optimizer_decays_by_role_within():
    """As optax computes it for one weight that decays and one that does not."""
    weights = tiny.llama().weights
    params = jax.tree.map(lambda w: np.ones(w.shape, np.float32), weights)
    grads = jax.tree.map(lambda w: np.full(w.shape, 0.1, np.float32), weights)

    def two(tx, params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    ours = optimizer("optax.contrib.schedule_free_adamw", weights, lr=0.1, weight_decay=0.5)
    got = two(ours, params, grads)
    for name, decay in (("unembedding", 0.5), ("norm", 0.0)):
        tx = optax.contrib.schedule_free_adamw(0.1, weight_decay=decay)
        assert tiny.relative_error(got[name], two(tx, params[name], grads[name])) < 1e-6


def test_without_an_average_the_state_is_evaluated_itself():
    model, place = tiny.llama(), tiny.partitioner()
    state = init_state(model, optax.adam(0.1), place)
    assert averaged(model, state) is state


def test_a_state_and_a_step_agree_on_the_average():
    model, place = tiny.llama(), tiny.partitioner()
    state, batch = init_state(model, optax.sgd(0.1), place), tiny.batch(place)
    with pytest.raises(UserError, match=r"the state has no average .* this step keeps one"):
        make_train_step(model, optax.sgd(0.1), place, ema=0.9)(state, batch)
    with pytest.raises(UserError, match=r"the state has an average .* this step does not keep one"):
        make_train_step(model, optax.sgd(0.1), place)(start_ema(model, state), batch)
    with pytest.raises(UserError, match=r"ema.decay = 1.0: must be from 0 to below 1"):
        make_train_step(model, optax.sgd(0.1), place, ema=1.0)


def test_a_run_resumes_its_average_exactly_and_evaluates_it(tmp_path):
    ema = ("ema.decay=0.9", "eval.every=6")
    whole = fit(tmp_path / "whole", *ema)
    fit(tmp_path / "run", *ema, stop_after=5)
    run = fit(tmp_path / "run", *ema)
    assert_same_bits(jax.device_get(run.state), jax.device_get(whole.state))
    live = dataclasses.replace(whole.state, ema={})
    by_average = evaluated(whole, dataclasses.replace(live, params=whole.state.ema))
    by_last = evaluated(whole, live)
    (line,) = [row for row in metrics(whole.directory) if row["step"] == 12]
    assert line["eval_loss"] == pytest.approx(by_average, rel=1e-6)
    assert abs(by_last - by_average) > 1e-3
    assert fit(tmp_path / "run", *ema, "ema.evaluate=false").evaluate()["eval_loss"] == pytest.approx(by_last, rel=1e-6)


def evaluated(run, state) -> float:
    """The held-out loss of a state without an average."""
    run.loop.state = state
    return run.evaluate()["eval_loss"]


@pytest.mark.full
def test_an_old_run_starts_its_average_from_its_weights(tmp_path, caplog):
    without = fit(tmp_path / "without")
    fit(tmp_path / "run", stop_after=11)
    run = fit(tmp_path / "run", "ema.decay=0.9")
    assert "has no average of the weights (ema): it starts from the weights" in caplog.text
    assert losses(tmp_path / "run") == losses(without.directory)
    # one step after the start, the average is near the weights
    arrays = [row.path for row in parameter_table(tmp_path / "run", 12)]
    assert any(path.startswith("ema.") for path in arrays)
    gap = jax.tree.map(lambda e, p: float(jnp.abs(e - p).max()), run.state.ema, run.state.params)
    assert 0 < max(jax.tree.leaves(gap)) < 0.1
    fit(tmp_path / "run", "run.steps=13")
    assert "is dropped, since ema.decay is null" in caplog.text


EMA, SCHEDULE_FREE = "ema.decay=0.9", "optimizer={type: schedule_free_adamw, lr: 3.0e-3, schedule: {type: constant}}"
PIPE = ("mesh={pipe: 2, fsdp: 4}", "pipeline.microbatches=2")


PIPED = [pytest.param((average, *PIPE), marks=pytest.mark.full) for average in (EMA, SCHEDULE_FREE)]


@pytest.mark.parametrize("overrides", [(EMA,), (SCHEDULE_FREE,), *PIPED], ids=str)
def test_a_checkpoint_is_evaluated_at_its_average_as_in_the_run(tmp_path, overrides):
    fit(tmp_path / "run", *overrides, "run.steps=6")
    logged = metrics(tmp_path / "run")[-1]["eval_loss"]
    assert evaluated_by_command(tmp_path / "run") == pytest.approx(logged, rel=1e-6)
    if PIPE[0] in overrides:
        assert evaluated_by_command(tmp_path / "run", "devices.emulate=1") == pytest.approx(logged, rel=1e-5)
    elif EMA in overrides:
        assert abs(evaluated_by_command(tmp_path / "run", "ema.evaluate=false") - logged) > 1e-3


def evaluated_by_command(directory, *overrides) -> float:
    """The held-out loss as `shardtrain eval` finds it."""
    result = shardtrain("eval", directory, *overrides, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)["loss"]


@pytest.mark.full
def test_an_average_that_the_config_has_only_now_is_not_looked_for(tmp_path):
    fit(tmp_path / "run", "run.steps=4")
    logged = metrics(tmp_path / "run")[-1]["eval_loss"]
    assert evaluated_by_command(tmp_path / "run", EMA) == pytest.approx(logged, rel=1e-6)
