"""Cross entropy: its value and gradient, in chunks, over a sharded vocabulary, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import equations, partition, quick
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.hlo import collectives
from shardtrain.nn.linear import einsum
from shardtrain.sharding import use

B, S, D, V = 4, 6, 5, 16
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(B, S, D)), RNG.normal(size=(D, V))
TARGETS = RNG.integers(0, V, (B, S)).astype("i4")
MASK = RNG.integers(0, 3, (B, S)) / 2


def formula(logits, z_loss=0.0):
    """Loss, entropy and weight from the definition, in float64."""
    log_z = np.log(np.exp(logits).sum(-1))
    entropy = ((log_z - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]) * MASK).sum()
    return entropy + z_loss * (log_z**2 * MASK).sum(), entropy, MASK.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradient(x64, z_loss):
    logits = jnp.asarray(X @ W)
    run = lambda a: nn.cross_entropy(a, TARGETS, jnp.asarray(MASK), z_loss=z_loss)  # noqa: E731
    loss, weight, metrics = quick(run)(logits)
    expected, entropy, total = formula(X @ W, z_loss)
    np.testing.assert_allclose([loss, weight], [expected, total], rtol=1e-13)
    np.testing.assert_allclose(metrics["cross_entropy"], (entropy, total), rtol=1e-13)

    grad = quick(jax.grad(lambda a: run(a)[0]))(logits)
    log_z = np.log(np.exp(X @ W).sum(-1, keepdims=True))
    softmax = np.exp(X @ W - log_z)
    by_hand = (softmax * (1 + 2 * z_loss * log_z) - np.eye(V)[TARGETS]) * MASK[..., None]
    np.testing.assert_allclose(grad, by_hand, rtol=1e-11, atol=1e-13)


def test_ignored_tokens_count_for_nothing_whatever_their_label():
    mask = np.ones((B, S), "f4")
    mask[:, 2] = 0
    labels = TARGETS.copy()
    labels[:, 2] = -100
    logits = jnp.asarray(X @ W, jnp.float32)
    run = quick(jax.value_and_grad(lambda a, t: nn.cross_entropy(a, t, mask)[0]))
    loss, grad = run(logits, labels)
    assert loss == run(logits, TARGETS)[0]
    assert not grad[:, 2].any()
    assert grad[:, 1].any()


def test_large_logits_do_not_overflow():
    loss, weight, _ = quick(nn.cross_entropy)(jnp.asarray([[[3e4, 0.0]]]), jnp.asarray([[1]]), jnp.ones((1, 1)))
    assert (loss, weight) == (3e4, 1)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.asarray(X @ W, jnp.bfloat16)
    found = equations(lambda a: nn.cross_entropy(a, TARGETS, MASK.astype("f4"))[0], logits)
    assert {e.outvars[0].aval.dtype for e in found if e.primitive.name in ("exp", "log", "reduce_sum")} == {
        jnp.float32.dtype
    }
    loss, _, _ = quick(nn.cross_entropy)(logits, TARGETS, MASK.astype("f4"))
    np.testing.assert_allclose(loss, formula(np.asarray(logits, np.float64))[0], rtol=1e-6)


def losses(x, w, chunk, z_loss=0.1):
    head = lambda x: jnp.einsum("BSD,DV->BSV", x, w)  # noqa: E731
    if chunk is None:
        return nn.cross_entropy(head(x), TARGETS, jnp.asarray(MASK), z_loss=z_loss)
    return nn.chunked_cross_entropy(head, x, TARGETS, jnp.asarray(MASK), chunk=chunk, z_loss=z_loss)


@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_chunks_change_nothing(x64, chunk):
    def run(chunk):
        grad = jax.value_and_grad(lambda x, w: (lambda out: (out[0], out))(losses(x, w, chunk)), (0, 1), has_aux=True)
        return jax.tree.leaves(quick(grad)(jnp.asarray(X), jnp.asarray(W)))

    for got, want in zip(run(chunk), run(None), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk", [0, 4, 7])
def test_a_chunk_divides_the_sequence(chunk):
    with pytest.raises(UserError, match=f"loss_chunk {chunk} does not divide the sequence of 6; use a divisor of 6"):
        losses(jnp.asarray(X), jnp.asarray(W), chunk)


@pytest.mark.parametrize("chunked", [False, True])
def test_chunks_keep_the_logits_out_of_memory(chunked):
    length, vocab = 256, 16384
    logits_bytes = 4 * length * vocab

    def loss(x, w):
        head = lambda x: jnp.einsum("BSD,DV->BSV", x, w)  # noqa: E731
        targets, mask = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length))
        if chunked:
            return nn.chunked_cross_entropy(head, x, targets, mask, chunk=16)[0]
        return nn.cross_entropy(head(x), targets, mask)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, length, 8), (8, vocab))]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < logits_bytes / 2 if chunked else temporary >= logits_bytes


@pytest.mark.parametrize(("sizes", "chunk"), [({"tensor": 8}, None), ({"fsdp": 2, "tensor": 4}, 2)], ids=str)
def test_a_sharded_vocabulary_is_never_gathered(sizes, chunk):
    partitioner = partition(**sizes)
    axes, precision = ("embed", "vocab"), nn.Precision()
    vocab = 80  # no other dim, whole or split, has a size of 80 / 8 or 80 / 4
    x, w, mask = X[..., :4].astype("f4"), RNG.normal(size=(4, vocab)).astype("f4"), MASK.astype("f4")

    def loss(x, w):
        head = lambda x: einsum("BSD,DV->BSV", x, w, axes, precision)  # noqa: E731
        if chunk is None:
            return nn.cross_entropy(head(x), TARGETS, mask, z_loss=0.1)[0]
        return nn.chunked_cross_entropy(head, x, TARGETS, mask, chunk=chunk, z_loss=0.1)[0]

    def step(x, w):
        with use(partitioner):
            return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)
    placed = jax.device_put((x, w), (partitioner.sharding(("batch", None, None)), partitioner.sharding(axes)))
    compiled = jax.jit(step).lower(*placed).compile()
    for got, want in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    found = collectives(compiled.as_text(), partitioner.mesh)
    over_tensor = [c for c in found if "tensor" in c.axes]
    assert {c.kind for c in over_tensor} == {"all-reduce"}  # of sums over the vocabulary: no gather, no exchange
    sent = {size for c in over_tensor for shape in c.shapes for size in shape}
    assert not sent & {vocab, vocab // partitioner.size("vocab")}
