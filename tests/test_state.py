"""State: made sharded, the same on every mesh, never whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from shardtrain.errors import UserError
from shardtrain.optim import optimizer
from shardtrain.train.state import abstract_state, init_function, init_state
from shardtrain.weights.paths import flatten
from shardtrain.weights.report import sharding_report


def make(model, **mesh):
    place = tiny.partitioner(**mesh)
    return init_state(model, optimizer("adamw", model.weights, lr=0.1), place, seed=4)


def test_the_values_depend_on_the_seed_and_not_on_the_mesh():
    model = tiny.llama()
    one, many = make(model), make(model, fsdp=4, tensor=2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(many))
    layers = np.asarray(one.params["blocks"]["layer"]["mlp"]["up"]["weight"])
    assert np.abs(layers[0] - layers[1]).max() > 0.01  # every layer draws its own


def test_every_leaf_lies_where_the_abstract_state_says():
    model, place = tiny.llama(), tiny.partitioner(fsdp=4, tensor=2)
    tx = optimizer("adamw", model.weights, lr=0.1)
    want, got = abstract_state(model, tx, place), init_state(model, tx, place)
    jax.tree.map(
        lambda w, g: np.testing.assert_equal((g.shape, g.dtype, g.sharding), (w.shape, w.dtype, w.sharding)),
        want,
        got,
    )
    table = got.params["embedding"]["weight"]
    assert table.sharding.spec == jax.P("tensor", "fsdp")
    assert table.addressable_shards[0].data.size == table.size // 8


def test_initialisation_holds_no_full_copy_of_a_sharded_weight():
    """A model of 8 devices' size: what one device holds at any time stays near its own share."""
    model, place = tiny.llama(n_layers=8, d_model=128, d_ff=512, vocab_size=1024), tiny.partitioner(fsdp=8)
    tx = optimizer("adamw", model.weights, lr=0.1)
    total = sum(w.nbytes for w in flatten(model.weights).values())
    memory = init_function(model, tx, place).lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.1 * 3 * total / 8  # parameters and two moments
    assert memory.temp_size_in_bytes < total / 2


def test_the_report_counts_what_is_replicated_and_refuses_too_much():
    model, place = tiny.llama(), tiny.partitioner(fsdp=4, tensor=2)
    report = sharding_report(model.weights, place)
    norms = sum(w.nbytes for path, w in flatten(model.weights).items() if w.role == "norm")
    assert report.replicated_bytes == norms
    assert report.device_bytes == norms + (report.total_bytes - norms) // 8
    report.check(0.1)
    with pytest.raises(UserError, match=r"replicated on every device, above the limit of 0%.*norm.scale.*logical axes"):
        report.check(0.0)
    sharding_report(model.weights, tiny.partitioner(data=8)).check(0.0)  # data parallel replicates by intent


def test_a_weight_that_does_not_divide_is_named():
    model, place = tiny.llama(n_heads=6, n_kv_heads=6, head_dim=8), tiny.partitioner(tensor=4)
    with pytest.raises(
        UserError, match=r"weight blocks.layer.attention.* = 6: the rules split '(kv_)?heads' over tensor 4.* 4 or 8"
    ):
        abstract_state(model, optimizer("sgd", model.weights, lr=0.1), place)


def test_float64_parameters_are_float64():
    with jax.enable_x64(True):
        state = make(tiny.llama(jnp.float64))
        assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float64")}
