"""The norms of gradients and weights by layer: right on every mesh, only when they are due, in next to no memory."""

import jax
import numpy as np
import pytest

import tiny
from commands import compiled_once, fit, metrics  # noqa: F401
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.norms import by_layer
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_train_step
from shardtrain.weights.paths import flatten


def step_of(model, place, norms_every):
    tx = optimizer("sgd", model.weights, lr=0.1, clip_norm=None)
    return tx, make_train_step(model, tx, place, norms_every=norms_every)


def norms_after(model, place, steps):
    """The norms that each of some steps returns, and the weights before each."""
    tx, step = step_of(model, place, 2)
    state, found, before = init_state(model, tx, place), [], []
    for _ in range(steps):
        before.append(jax.device_get(model.canonical(state.params)))
        state, returned = step(state, tiny.batch(place))
        found.append(by_layer(returned["norms"]))
    before.append(jax.device_get(model.canonical(state.params)))
    return found, before


def test_norms_are_those_of_each_layer_and_only_when_due():
    (none, found), (_, before, after) = norms_after(tiny.llama(), tiny.partitioner(fsdp=4, tensor=2), 2)
    assert not any(none.values())
    for path, weight in flatten(before).items():
        gradient = (np.asarray(weight) - np.asarray(flatten(after)[path])) / 0.1  # of plain sgd without decay
        parts = (
            enumerate(zip(weight, gradient, strict=True)) if path.startswith("blocks.") else [("", (weight, gradient))]
        )
        for layer, (w, g) in parts:
            name = f"{path}/{layer}".rstrip("/")
            assert found[f"weight_norms/{name}"] == pytest.approx(np.linalg.norm(w), rel=1e-5)
            assert found[f"grad_norms/{name}"] == pytest.approx(np.linalg.norm(g), rel=2e-2, abs=1e-5)


@pytest.mark.full
def test_a_pipeline_reports_the_same_layers():
    (_, want), _ = norms_after(tiny.llama(), tiny.partitioner(fsdp=4), 2)
    base = tiny.llama()
    piped = ModelDef(base.make, schedule=schedules.make("1f1b", 2, 4))
    (_, found), _ = norms_after(piped, tiny.partitioner(pipe=2, fsdp=4), 2)
    assert found.keys() == want.keys()
    assert found == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_ranks_that_skip_their_work_may_meet_in_the_norms():
    """All of them compute the norms in the same steps."""
    piped = ModelDef(tiny.llama().make, schedule=schedules.make("1f1b", 2, 4), idle="skip")
    place = tiny.partitioner(pipe=2)
    tx, step = step_of(piped, place, 2)
    step.lower(abstract_state(piped, tx, place), tiny.batch(place)).compile()  # refuses what is not safe


@pytest.mark.full
def test_norms_take_next_to_no_memory():
    model, place = tiny.llama(d_model=64, d_ff=128), tiny.partitioner(fsdp=4, tensor=2)
    sizes = []
    for every in (None, 2):
        tx, step = step_of(model, place, every)
        compiled = step.lower(abstract_state(model, tx, place), tiny.batch(place)).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 1.01 * sizes[0]


def test_a_run_logs_them_at_its_steps(tmp_path):
    fit(tmp_path / "run", "run.steps=5", "log.norms=2", "log.every=5")
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    assert [step for step, row in rows.items() if any(key.startswith("grad_norms/") for key in row)] == [2, 4]
    assert {"grad_norms/embedding.weight", "weight_norms/blocks.layer.mlp.up.weight/1"} <= rows[4].keys()
