"""Means of sums: in float32 at least, and of a batch that has nothing to divide by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.train.evaluation import evaluate
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import init_state
from shardtrain.train.step import make_eval_step, make_train_step


class Router(nnx.Module):
    """A block whose auxiliary term has no weight: nothing in the batch belongs to it."""

    def __init__(self, rngs):
        self.mlp = nn.GatedMLP(32, 64, rngs=rngs)

    def __call__(self, x, ctx):
        return x + self.mlp(x, ctx), {"none": (jnp.square(x).sum() * 0, jnp.zeros(()))}


class Routed(Llama):
    def __init__(self, rngs):
        super().__init__(**tiny.SIZES, rngs=rngs)
        self.blocks = nn.Stack(Router, 2, rngs=rngs)


CASES = [({}, 1), ({"data": 2}, 2), ({"pipe": 2}, 1)]


@pytest.mark.parametrize(("mesh", "accumulate"), CASES)
def test_a_batch_without_a_target_is_no_divergence_and_changes_nothing(mesh, accumulate):
    place = tiny.partitioner(**mesh)
    model = ModelDef(Routed, schedule=schedules.make("1f1b", 2, 4) if "pipe" in mesh else None)
    tx = optimizer("adamw", model.weights, lr=1e-2, clip_norm=1.0)
    step = make_train_step(model, tx, place, accumulate=accumulate, lr=lambda count: 0.5 * count)
    full = tiny.batch(place)
    empty = {**full, "targets": jnp.full_like(full["targets"], -100)}
    state, metrics = step(init_state(model, tx, place), full)
    assert (int(metrics["skipped"]), float(metrics["none"])) == (0, 0), "a term without weight is no divergence either"
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, empty)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    assert {name: float(value) for name, value in metrics.items()} == {
        **dict.fromkeys(("loss", "cross_entropy", "none", "weight", "grad_norm", "skipped", "skipped_in_row"), 0),
        "lr": 0.5,
    }
    state, metrics = step(state, full)
    assert (int(state.step), float(metrics["lr"])) == (3, 0.5), "the schedule counts the updates that were made"
    with pytest.raises(UserError, match=r"none of the targets in its 16 rows counts, since loss_mask is"):
        evaluate(make_eval_step(model, place), state, [empty])
    assert "none" not in evaluate(make_eval_step(model, place), state, [empty, full]), "it has no mean"


class Slope(nnx.Module):
    def __init__(self, rngs):
        self.w = nn.param(rngs.params(), (4,), ("embed",), jax.nn.initializers.ones, jnp.float32, "matrix")


def weighted(module, batch, ctx):
    return (module.w[...] * batch["x"] * batch["weight"]).sum(), batch["weight"].sum(), {}


def test_a_batch_without_weight_neither_ends_nor_lengthens_a_row_of_skipped_steps():
    place, model, tx = tiny.partitioner(), ModelDef(Slope), optax.sgd(0.1)
    step, state = make_train_step(model, tx, place, loss=weighted), init_state(model, tx, place)
    seen = []
    for x, weight in ((np.nan, 1), (1, 0), (np.nan, 1), (1, 1)):
        batch = {"x": jnp.full((2, 4), x, jnp.float32), "weight": jnp.full((2, 1), weight, jnp.float32)}
        state, metrics = step(state, batch)
        seen.append((int(metrics["skipped"]), int(metrics["skipped_in_row"])))
    assert seen == [(1, 1), (1, 1), (2, 2), (2, 0)]
