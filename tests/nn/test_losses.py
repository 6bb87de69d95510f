"""Cross entropy: its value and gradient, in chunks, over a sharded vocabulary, and what it costs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from helpers import equations, quick
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.hlo import collectives
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


F64 = nn.Precision(jnp.float64, jnp.float64, jnp.float64)
HEAD, TIED = ("embed", "vocab"), ("vocab", "embed")


def head(w, axes=HEAD, precision=nn.Precision()):
    """An output head with a given weight."""
    return SimpleNamespace(weight=w, axes=axes, precision=precision)


def losses(x, w, chunk, axes=HEAD):
    layer, mask = head(w, axes, F64), jnp.asarray(MASK)
    return nn.linear_cross_entropy(x, layer, TARGETS, mask, chunk=chunk, z_loss=0.1)


@pytest.mark.parametrize(("chunk", "axes"), [(None, HEAD), (1, HEAD), (2, TIED), (6, TIED), ("auto", HEAD)], ids=str)
def test_chunks_change_nothing(x64, chunk, axes):
    plain = lambda x, w: nn.cross_entropy(x @ w, TARGETS, jnp.asarray(MASK), z_loss=0.1)  # noqa: E731
    turned = lambda x, w: losses(x, w if axes == HEAD else w.T, chunk, axes)  # noqa: E731

    def run(loss):
        grad = jax.value_and_grad(lambda x, w: (lambda out: (out[0], out))(loss(x, w)), (0, 1), has_aux=True)
        return jax.tree.leaves(quick(grad)(jnp.asarray(X), jnp.asarray(W)))

    for got, want in zip(run(turned), run(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_the_logits_are_those_of_the_layer():
    x, rngs = jnp.asarray(X, jnp.float32), nnx.Rngs(0)
    table, linear = nn.Embedding(V, D, rngs=rngs), nn.Linear("BSD,DV->BSV", (D, V), HEAD, rngs=rngs)
    np.testing.assert_array_equal(nn.logits(x, table), table.attend(x))
    np.testing.assert_array_equal(nn.logits(x, linear), linear(x))


@pytest.mark.parametrize(
    ("axes", "bias", "what"),
    [(HEAD, True, r"\('embed', 'vocab'\), with a bias"), (("embed", "mlp"), False, r"\('embed', 'mlp'\); it must")],
    ids=str,
)
def test_an_output_head_has_a_vocabulary_and_no_bias(axes, bias, what):
    layer = nn.Linear("BSD,DV->BSV", (D, V), axes, bias=bias, rngs=nnx.Rngs(0))
    for call in (nn.logits, lambda *a: nn.linear_cross_entropy(*a, TARGETS, MASK)):
        with pytest.raises(UserError, match=f"the output head has a weight with axes {what}"):
            call(jnp.asarray(X), layer)


@pytest.mark.parametrize("chunk", [0, 4, 7])
def test_a_chunk_divides_the_sequence(chunk):
    with pytest.raises(UserError, match=f"loss_chunk {chunk} does not divide the sequence of 6; use a divisor of 6"):
        losses(jnp.asarray(X), jnp.asarray(W), chunk)


def compiled_gradient(vocab, length, chunk, compute=jnp.float32, **sizes):
    """The loss's gradient by input and head, for 8 model dims; compiled, not run."""
    place, precision = tiny.partitioner(**sizes), nn.Precision(compute=compute)
    batch = place.sharding(("batch", "seq"))

    def loss(x, w, targets, mask):
        return nn.linear_cross_entropy(x, head(w, HEAD, precision), targets, mask, chunk=chunk)[0]

    def gradient(*args):
        with use(place):
            return jax.grad(loss, argnums=(0, 1))(*args)

    args = [
        jax.ShapeDtypeStruct((8, length, 8), compute, sharding=batch),
        jax.ShapeDtypeStruct((8, vocab), jnp.float32, sharding=place.sharding(HEAD)),
        jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=batch),
        jax.ShapeDtypeStruct((8, length), jnp.float32, sharding=batch),
    ]
    return jax.jit(gradient).lower(*args).compile(), place.mesh


@pytest.mark.parametrize(("sizes", "rows", "parts"), [({"fsdp": 8}, 1, 1), ({"tensor": 8}, 8, 8)], ids=str)
def test_128k_logits_are_never_in_memory_at_once(sizes, rows, parts):
    vocab, length = 131072, 4096
    logits_bytes = 4 * rows * length * vocab // parts  # of one device
    memory = lambda chunk: compiled_gradient(vocab, length, chunk, **sizes)[0].memory_analysis().temp_size_in_bytes  # noqa: E731
    assert memory(None) >= logits_bytes
    assert memory("auto") < logits_bytes / 2
    assert memory(16) < logits_bytes / 32


def test_chunks_gather_and_reduce_the_head_once():
    compiled, mesh = compiled_gradient(1024, 64, 8, fsdp=8)
    found = collectives(compiled.as_text(), mesh)
    assert [(c.kind, c.shapes, c.loops) for c in found] == [
        ("all-gather", ((8, 1024),), ()),  # kept from forward to backward here, where nothing lies between
        ("all-reduce", ((8, 1024),), ()),
    ]


@pytest.mark.parametrize(("chunk", "matmuls"), [(None, 3), (2, 4)])
def test_chunks_cost_one_matmul_more(chunk, matmuls):
    x, w, mask = X.astype("f4"), W.astype("f4"), MASK.astype("f4")
    loss = lambda x, w: nn.linear_cross_entropy(x, head(w), TARGETS, mask, chunk=chunk)[0]  # noqa: E731
    found = equations(jax.grad(loss, argnums=(0, 1)), x, w)
    assert len([e for e in found if e.primitive.name == "dot_general"]) == matmuls


def test_the_heads_gradient_adds_up_in_float32_over_bfloat16_chunks():
    x, w = jnp.ones((1, 512, 1), jnp.bfloat16), jnp.zeros((1, 4), jnp.bfloat16)
    narrow = nn.Precision(*[jnp.bfloat16] * 3)
    targets, mask = jnp.zeros((1, 512), jnp.int32), jnp.ones((1, 512))
    loss = lambda w: nn.linear_cross_entropy(x, head(w, HEAD, narrow), targets, mask, chunk=1)[0]  # noqa: E731
    # In bfloat16 the sum of 512 quarters would stop at 64, where a quarter is half of the last place.
    np.testing.assert_array_equal(quick(jax.grad(loss))(w)[0].astype("f4"), [-384, 128, 128, 128])


@pytest.mark.parametrize(("sizes", "chunk"), [({"tensor": 8}, None), ({"fsdp": 2, "tensor": 4}, 2)], ids=str)
def test_a_sharded_vocabulary_is_never_gathered(sizes, chunk):
    partitioner = tiny.partitioner(**sizes)
    vocab = 80  # no other dim, whole or split, has a size of 80 / 8 or 80 / 4
    x, w, mask = X[..., :4].astype("f4"), RNG.normal(size=(4, vocab)).astype("f4"), MASK.astype("f4")

    def loss(x, w):
        return nn.linear_cross_entropy(x, head(w), TARGETS, mask, chunk=chunk, z_loss=0.1)[0]

    def step(x, w):
        with use(partitioner):
            return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)
    placed = jax.device_put((x, w), (partitioner.sharding(("batch", None, None)), partitioner.sharding(HEAD)))
    compiled = jax.jit(step).lower(*placed).compile()
    for got, want in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    found = collectives(compiled.as_text(), partitioner.mesh)
    over_tensor = [c for c in found if "tensor" in c.axes]
    assert {c.kind for c in over_tensor} == {"all-reduce"}  # of sums over the vocabulary: no gather, no exchange
    sent = {size for c in over_tensor for shape in c.shapes for size in shape}
    assert not sent & {vocab, vocab // partitioner.shards("vocab")}


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_negative_target_counts_for_nothing(chunk):
    """As Hugging Face's data has them: -100 where nothing is to be learned, with or without a mask."""
    x, w = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)
    ignored = np.arange(S) % 3 == 0

    def loss(x, targets, mask):
        return nn.linear_cross_entropy(x, head(w), targets, mask, chunk=chunk, z_loss=0.1)

    run = quick(jax.value_and_grad(lambda *a: loss(*a)[0]))
    negative = np.where(ignored, -100, TARGETS).astype("i4"), np.ones((B, S), "f4")
    masked = TARGETS, np.where(ignored, 0, np.ones((B, S))).astype("f4")
    jax.tree.map(np.testing.assert_array_equal, run(x, *negative), run(x, *masked))
    jax.tree.map(np.testing.assert_array_equal, quick(loss)(x, *negative), quick(loss)(x, *masked))


@pytest.mark.parametrize("z_loss", [-1.0, 2.0, float("nan")])
def test_a_z_loss_is_a_fraction(z_loss):
    with pytest.raises(UserError, match=r"z_loss = .*: must be from 0 to 1; 0 for none"):
        nn.cross_entropy(jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), "i4"), jnp.ones((1, 3)), z_loss=z_loss)
