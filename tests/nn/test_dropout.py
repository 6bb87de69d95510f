"""Dropout masks: functions of (key, layer, site, global row), and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tiny
from helpers import quick
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.sharding import use

ROWS, SHAPE = 16, (16, 8, 8)
X = np.ones(SHAPE, "f4")
ROW = np.arange(ROWS, dtype=np.int32)


def drop(x=X, row=ROW, layer=0, step=0, *, rate=0.5, site="mlp", train=True):
    key = jax.random.fold_in(jax.random.key(0), step)
    return nn.Dropout(rate, site)(x, nn.Context({"row": row}, key=key, layer=layer, train=train))


fast = quick(drop, static_argnames=("rate", "site", "train"))


@pytest.fixture(scope="module")
def mask():
    return np.asarray(fast())


def test_permuted_rows_have_permuted_masks(mask):
    order = np.random.default_rng(0).permutation(ROWS)
    assert np.array_equal(fast(row=ROW[order]), mask[order])


@pytest.mark.parametrize("count", [2, 4])
def test_strided_microbatches_have_the_masks_of_the_whole(mask, count):
    for m in range(count):
        assert np.array_equal(fast(X[m::count], ROW[m::count]), mask[m::count])


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}], ids=str
)
def test_the_mesh_does_not_change_the_mask(mask, sizes):
    partitioner = tiny.partitioner(**sizes)

    def run(x, row):
        with use(partitioner):
            return partitioner.constrain(
                drop(partitioner.constrain(x, "batch", "seq", "mlp"), row), "batch", "seq", "mlp"
            )

    assert np.array_equal(quick(run)(X, ROW), mask)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "tensor": 2}], ids=str)
def test_a_manual_data_axis_does_not_change_the_mask(mask, sizes):
    split = {"in_specs": P("data"), "out_specs": P("data"), "axis_names": {"data"}, "check_vma": False}
    run = jax.shard_map(drop, mesh=tiny.partitioner(**sizes).mesh, **split)
    assert np.array_equal(quick(run)(X, ROW), mask)


@pytest.mark.parametrize("other", [{"layer": 1}, {"site": "attention"}, {"step": 1}], ids=str)
def test_layers_sites_and_steps_have_masks_of_their_own(mask, other):
    # Independent fair coins agree in half of the places.
    assert 0.4 < np.mean(np.asarray(fast(**other)) == mask) < 0.6


def test_rows_have_masks_of_their_own(mask):
    assert len({row.tobytes() for row in mask}) == ROWS


def test_a_layer_counts_from_the_start_of_the_model(mask):
    ctx = nn.Context({"row": ROW}, key=jax.random.fold_in(jax.random.key(0), 0), layer=2, train=True).at_layer(3)
    assert np.array_equal(quick(nn.Dropout(0.5, "mlp"))(X, ctx), fast(layer=5))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_and_the_scale_of_what_is_kept(rate):
    x = np.ones((4, 128, 64), "f4")
    y = np.asarray(fast(x, ROW[:4], rate=rate))
    assert np.unique(y).tolist() == [0, np.float32(1) / np.float32(1 - rate)]
    sigma = (rate * (1 - rate) / x.size) ** 0.5
    assert abs((y == 0).mean() - rate) < 5 * sigma


def test_identity_in_evaluation_and_at_rate_zero():
    assert drop(train=False) is X
    assert drop(rate=0.0) is X


def test_dtype_is_kept():
    assert jax.eval_shape(drop, jnp.ones(SHAPE, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_rate_is_a_probability_below_one(rate):
    with pytest.raises(UserError, match=f"dropout {rate} is not a probability below 1; use 0 <= dropout < 1"):
        nn.Dropout(rate, "mlp")
