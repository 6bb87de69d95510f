"""Our layers and losses never lean on implicit dtype promotion, and keep to the policy's dtypes throughout."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tiny
from helpers import equations, filled
from shardtrain import nn

POLICIES = {
    "float32": nn.Precision(),
    "bfloat16 compute": nn.Precision(compute=jnp.bfloat16),
    "all bfloat16": nn.Precision(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "float64": nn.Precision(jnp.float64, jnp.float64, jnp.float64),
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
BATCH = tiny.batch(rows=2, length=6, vocab=10, packed=True)


class Layers(nnx.Module):
    """One of each."""

    def __init__(self, precision, rngs):
        common = {"precision": precision, "rngs": rngs}
        self.embedding = nn.Embedding(10, 8, **common)
        self.norms = nnx.List([nn.LayerNorm(8, **common), nn.RMSNorm(8, **common)])
        options = {"qkv_bias": True, "qk_norm": True, "dropout": 0.1, "rope_scaling": YARN, "logit_soft_cap": 5.0}
        self.attention = nn.Attention(8, 2, 1, window=3, **options, **common)
        self.mlp = nn.GatedMLP(8, 12, dropout=0.1, **common)
        self.head = nn.Linear("BSD,DV->BSV", (8, 10), ("embed", "vocab"), bias=True, role="head", **common)

    def __call__(self, batch, ctx, chunk=None):
        x = self.embedding(batch["tokens"])
        x = x + self.attention(self.norms[0](x), ctx)
        x = x + self.mlp(self.norms[1](x), ctx)
        if chunk:
            target = batch["targets"], batch["loss_mask"]
            return nn.linear_cross_entropy(x, self.embedding, *target, chunk=chunk, z_loss=0.1)
        logits = self.embedding.attend(x) + self.head(x)
        return nn.cross_entropy(logits, batch["targets"], batch["loss_mask"], z_loss=0.1)


def traced(precision, chunk, *, gradient=True):
    graph, state = nnx.split(filled(lambda: Layers(precision, nnx.Rngs(0))))
    batch = BATCH | {"loss_mask": BATCH["loss_mask"].astype(precision.softmax)}
    ctx = nn.Context(batch, key=jax.random.key(0), layer=jnp.int32(0), train=True)
    loss = lambda s: nnx.merge(graph, s)(batch, ctx, chunk)[0]  # noqa: E731
    step = jax.value_and_grad(loss) if gradient else loss
    return equations(step, state), jax.eval_shape(step, state)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_layers_and_losses_under_strict_promotion(strict, policy, chunk):
    with jax.enable_x64(policy == "float64"):
        precision = POLICIES[policy]
        _, (loss, grads) = traced(precision, chunk)
        assert loss.dtype == precision.softmax
        assert {a.dtype for a in jax.tree.leaves(grads)} == {jnp.dtype(precision.params)}


def floats(found, side="outvars"):
    dtypes = {(e.primitive.name, getattr(v.aval, "dtype", None)) for e in found for v in getattr(e, side)}
    return {(name, str(d)) for name, d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)}


def test_float64_is_float64_in_every_equation(x64):
    found, _ = traced(POLICIES["float64"], 3)
    assert {dtype for _, dtype in floats(found)} == {"float64"}


def test_bfloat16_compute_means_bfloat16_matmuls():
    found, _ = traced(POLICIES["bfloat16 compute"], 3, gradient=False)
    assert {dtype for name, dtype in floats(found, "invars") if name == "dot_general"} == {"bfloat16"}
    assert {dtype for name, dtype in floats(found) if name in ("exp", "log", "rsqrt", "cos")} == {"float32"}
