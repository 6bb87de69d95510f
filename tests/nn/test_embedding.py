"""Token embedding and the tied head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from helpers import filled
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.sharding import use

F32 = nn.Precision()
MIXED = nn.Precision(jnp.float32, jnp.bfloat16, jnp.float32)
TOKENS = jnp.asarray([[3, 0, 3, 9], [1, 3, 9, 2]], jnp.int32)


def table(precision: nn.Precision = F32, vocab: int = 10, dim: int = 8) -> nn.Embedding:
    return filled(lambda: nn.Embedding(vocab, dim, precision=precision, rngs=nnx.Rngs(0)))


def test_lookup_takes_rows():
    layer = table()
    assert np.array_equal(layer(TOKENS), np.asarray(layer.weight[...])[TOKENS])
    assert layer.weight.role == "embedding"


def test_attend_is_the_transposed_table():
    layer, x = table(), jax.random.normal(jax.random.key(1), (2, 4, 8))
    np.testing.assert_allclose(layer.attend(x), np.asarray(x) @ np.asarray(layer.weight[...]).T, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_lookup_sums_over_equal_tokens(x64):
    graph, state = nnx.split(table(nn.Precision(jnp.float64, jnp.float64)))  # reduce stays at its default
    dy = np.random.default_rng(0).normal(size=(2, 4, 8))
    grads = jax.grad(lambda s: (nnx.merge(graph, s)(TOKENS) * dy).sum())(state)
    expected = np.zeros((10, 8))
    np.add.at(expected, TOKENS, dy)
    np.testing.assert_allclose(grads.weight[...], expected, rtol=1e-14)


def test_a_frequent_token_counts_further_than_bfloat16_does():
    graph, state = nnx.split(table(MIXED))
    tokens = jnp.full((1, 4099), 3, jnp.int32)
    assert nnx.merge(graph, state)(tokens).dtype == jnp.bfloat16
    grads = jax.grad(lambda s: nnx.merge(graph, s)(tokens).astype(jnp.float32).sum())(state)
    assert np.array_equal(grads.weight[3], np.full(8, 4099.0))


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_sharded_table_looks_up_and_learns_the_same(sizes):
    partitioner = tiny.partitioner(**sizes)
    layer = table(vocab=16)
    graph, state = nnx.split(layer)
    tokens = jax.random.randint(jax.random.key(2), (8, 6), 0, 16)

    def run(state, tokens):
        with use(partitioner):
            y, back = jax.vjp(lambda s: nnx.merge(graph, s)(tokens), state)
            return y, back(jnp.cos(y))[0].weight[...]

    sharding = partitioner.sharding(("vocab", "embed"))
    placed = jax.tree.map(lambda a: jax.device_put(a, sharding), state)
    y, dw = jax.jit(run)(placed, jax.device_put(tokens, partitioner.sharding(("batch", "seq"))))
    assert np.array_equal(y, layer(tokens))
    assert dw.sharding.is_equivalent_to(sharding, 2)
    expected = np.zeros((16, 8), "f4")
    np.add.at(expected, tokens, np.cos(y))
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-6)


def test_positions_are_read_from_the_batch():
    layer = filled(lambda: nn.PositionEmbedding(6, 8, rngs=nnx.Rngs(0)))
    positions = jnp.asarray([[0, 1, 2, 3], [5, 0, 1, 2]], jnp.int32)
    assert np.array_equal(layer(positions), np.asarray(layer.weight[...])[positions])
    assert (layer.weight.role, layer.weight.axes) == ("embedding", ("positions", "embed"))


def test_a_sequence_longer_than_the_table_is_refused_while_it_is_traced():
    layer = nnx.eval_shape(lambda: nn.PositionEmbedding(6, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"the sequence has 7 positions, but the position table only 6 \(max_len\)"):
        jax.eval_shape(layer, jax.ShapeDtypeStruct((2, 7), jnp.int32))
    with pytest.raises(UserError, match="a position table of 0 positions"):
        nn.PositionEmbedding(0, 8, rngs=nnx.Rngs(0))


def test_a_sharded_position_table_learns_the_same(x64):
    precision = nn.Precision(jnp.float64, jnp.float64)
    graph, state = nnx.split(filled(lambda: nn.PositionEmbedding(8, 8, precision=precision, rngs=nnx.Rngs(0))))
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 8, (8, 4)), jnp.int32)
    dy = np.random.default_rng(1).normal(size=(8, 4, 8))

    def gradient(state):
        return jax.grad(lambda s: (nnx.merge(graph, s)(positions) * dy).sum())(state).weight[...]

    want = gradient(state)
    with use(tiny.partitioner(fsdp=4, tensor=2)):
        np.testing.assert_allclose(jax.jit(gradient)(state), want, rtol=1e-13)
