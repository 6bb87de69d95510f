"""Idle ranks that skip their work: what the compiler makes of it, and which programs may not.

That gradients stay the same is in `test_backward_modes.py`.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.hlo import collectives
from shardtrain.models.llama import Llama
from shardtrain.pipeline import schedules
from shardtrain.pipeline.idle import UNIFORM, check_branches
from shardtrain.sharding import constrain
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_train_step


def llama(idle: str, ranks: int) -> ModelDef:
    options = {**tiny.SIZES, "n_layers": 4}
    table = schedules.make("1f1b", ranks, 4)
    return ModelDef(lambda rngs: Llama(**options, rngs=rngs), schedule=table, idle=idle)


def lowered(model: ModelDef, **mesh: int):
    place, tx = tiny.partitioner(**mesh), optax.sgd(0.1)
    return make_train_step(model, tx, place).lower(abstract_state(model, tx, place), tiny.batch(place))


def test_ranks_meet_in_no_branch_and_messages_stay_outside():
    place = tiny.partitioner(pipe=4, fsdp=2)
    text = lowered(llama("skip", 4), pipe=4, fsdp=2).compile().as_text()
    assert " conditional(" in text
    found = collectives(text, place.mesh)
    moves = [c for c in found if c.kind == "collective-permute"]
    assert len(moves) == 2  # x down and g up: one loop over all ticks
    assert not any(c.conditional for c in moves)
    inside = [c for c in found if c.conditional]
    assert inside, "weights are gathered in the branches of the ranks that use them"
    assert all(c.axes == {"fsdp"} for c in inside)
    check_branches(text, place.mesh)


class Shifting(nnx.Module):
    """Mixes each position with the one before (RWKV's token shift), which may lie on another device."""

    def __init__(self, rngs):
        self.mlp = nn.GatedMLP(32, 64, rngs=rngs)

    def __call__(self, x_BSD, ctx):
        before_BSD = jnp.pad(x_BSD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return constrain(x_BSD + self.mlp((x_BSD + before_BSD) / 2, ctx), "batch", "seq", None), {}


class Shifted(Llama):
    def __init__(self, rngs):
        super().__init__(**{**tiny.SIZES, "n_layers": 2}, rngs=rngs)
        self.blocks = nn.Stack(Shifting, 2, rngs=rngs)


def test_a_permute_within_a_stage_is_refused_before_the_first_step():
    place, tx = tiny.partitioner(pipe=2, context=2), optax.sgd(0.1)
    model = ModelDef(Shifted, schedule=schedules.make("1f1b", 2, 4), idle="skip")
    state = init_state(model, tx, place)
    message = r"collective-permute of f32\[.* over context .*set pipeline.idle to compute"
    with pytest.raises(UserError, match=message):
        make_train_step(model, tx, place)(state, tiny.batch(place))
    assert not any(a.is_deleted() for a in jax.tree.leaves(state)), "nothing ran"


def test_collectives_that_join_ranks_are_refused():
    mesh = jax.make_mesh((2, 2), ("pipe", "tensor"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def program(axis: str, scope: str = "stage") -> str:
        def body(x):
            with jax.named_scope(scope):
                return jax.lax.cond(x.sum() > 0, lambda: jax.lax.psum(x, axis), lambda: x)

        spec = jax.sharding.PartitionSpec("pipe", "tensor")
        mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(mapped).lower(jnp.ones((2, 2))).compile().as_text()

    check_branches(program("tensor"), mesh)
    check_branches(program("pipe", scope=UNIFORM), mesh)
    with pytest.raises(
        UserError, match=r"collectives in branches .* \(1 found\); one is an? all-reduce of f32\[1,1\] over pipe"
    ):
        check_branches(program("pipe"), mesh)
    with pytest.raises(UserError, match=r"pipeline\.idle = skip: it cannot be shown to be safe"):
        check_branches(program("tensor").replace("all-reduce(", "all-new(", 1), mesh)


@pytest.mark.full
def test_a_skipping_step_compiles_once_and_trains_as_one_that_computes(caplog):
    place = tiny.partitioner(pipe=2)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))  # a norm over all ranks, in the guard's branch
    losses: dict[str, list[float]] = {"compute": [], "skip": []}
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for idle, values in losses.items():
            model = llama(idle, 2)
            state, step = init_state(model, tx, place, seed=2), make_train_step(model, tx, place)
            for i in range(3):
                state, metrics = step(state, tiny.batch(place, seed=i))
                values.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["skip"], losses["compute"], rtol=1e-6)
    compiled = [r for r in caplog.messages if "Finished XLA compilation of jit(step)" in r]
    assert len(compiled) == 2
