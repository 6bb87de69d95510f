"""Attention by a kernel that the compiler cannot split: each device's own rows and heads, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from shardtrain.errors import UserError
from shardtrain.hlo import collectives
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.pipeline import schedules
from shardtrain.sharding import use
from shardtrain.train.gradients import Gradients
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import init_state


def gradients(place, attention, schedule=None, compute=jnp.float32):
    options = {**tiny.SIZES, "attention": attention, "remat": "full", "precision": Precision(compute=compute)}
    model = ModelDef(lambda rngs: Llama(**options, rngs=rngs), schedule=schedule)
    state = init_state(model, optax.sgd(0.1), place)
    cuts = np.arange(tiny.ROWS)[:, None] % tiny.LENGTH  # each row has two segments, cut at a place of its own
    segments = (np.arange(tiny.LENGTH) >= cuts).astype(np.int32)
    batch = tiny.placed(tiny.batch() | {"segment_ids": segments}, place)

    @jax.jit
    def run(state, batch):
        with use(place):
            grads, sums, _ = Gradients(model, place)(state, batch, jax.random.key(7))
            return sums, model.canonical(grads)

    return jax.tree.map(np.asarray, run(state, batch))


@pytest.mark.parametrize(
    ("mesh", "schedule", "rules"),
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, None, {}, marks=pytest.mark.full),
        ({"context": 2, "tensor": 2}, None, {}),  # no device has all of a sequence
        pytest.param(
            {"tensor": 4}, None, {"kv_heads": None}, marks=pytest.mark.full
        ),  # half a group of queries on a device
        pytest.param(
            {"context": 2, "tensor": 2}, None, {"seq": None, "kv_heads": "context"}, marks=pytest.mark.full
        ),  # as many pieces, other axes
        pytest.param({"pipe": 2, "data": 2, "tensor": 2}, "1f1b", {}, marks=pytest.mark.full),
        pytest.param({"pipe": 2}, "1f1b", {}, marks=pytest.mark.full),
        pytest.param({"pipe": 2, "data": 2, "tensor": 2}, "zb_h1", {}, marks=pytest.mark.full),
        pytest.param({"pipe": 2, "fsdp": 2, "context": 2}, "gpipe", {}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_gradients_equal_those_of_one_device_without_a_kernel(mesh, schedule, rules):
    place = tiny.partitioner(rules, **mesh)
    table = schedules.make(schedule, 2, 2, 1) if schedule else None
    wanted = gradients(tiny.partitioner(), "einsum")
    assert tiny.relative_error(gradients(place, "xla", table), wanted) < 2e-5


@pytest.mark.full
@pytest.mark.parametrize("attention", ["einsum", "xla"])
def test_bfloat16_crosses_tensor_within_a_pipeline(attention):
    """XLA's CPU compiler ended the process here: of a sum over devices that does more than add (JAX 0.10.2, 0.12)."""
    table = schedules.make("1f1b", 2, 2, 1)
    sums, _ = gradients(tiny.partitioner(pipe=2, tensor=2), attention, table, jnp.bfloat16)
    wanted, _ = gradients(tiny.partitioner(), "einsum")
    np.testing.assert_allclose(sums["loss"][0], wanted["loss"][0], rtol=5e-3)


def test_a_kernel_sees_its_device_s_part_of_rows_and_heads():
    place, seen = tiny.partitioner(data=2, tensor=4), []

    def kernel(q_BSHK):
        seen.append(q_BSHK.shape)
        return -q_BSHK

    axes = ("batch", None, "heads", None)
    q_BSHK = np.arange(4 * 3 * 8 * 2.0).reshape(4, 3, 8, 2)
    out = jax.jit(lambda q: place.per_device(kernel, (q, axes), out=axes))(q_BSHK)
    np.testing.assert_array_equal(out, -q_BSHK)
    assert set(seen) == {(2, 3, 2, 2)}
    with pytest.raises(UserError, match=r"an array of kernel: dim 2 = 6: the rules split 'heads' over tensor 4, which"):
        place.per_device(kernel, (q_BSHK[:, :, :6], axes), out=axes)


def test_gradients_of_a_kernel_are_added_up_over_no_axis_that_splits_its_arrays():
    place, axes = tiny.partitioner(data=2, tensor=4), ("batch", None, "heads", None)
    array = jax.ShapeDtypeStruct((4, 3, 8, 2), jnp.float32, sharding=place.sharding(axes))
    kernel = jax.grad(lambda q: place.per_device(jnp.tanh, (q, axes), out=axes).sum())
    program = jax.jit(kernel, out_shardings=array.sharding).lower(array).compile()
    assert not collectives(program.as_text(), place.mesh)
