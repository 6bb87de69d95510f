"""A GPT from nothing: every layer is written here, and it trains on data, tensor and pipeline axes all the same.

Shapes: B batch, S sequence, D model dim, H heads, K head dim, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import shardtrain as st
from shardtrain import nn
from shardtrain.pipeline import schedules

NORMAL = jax.nn.initializers.normal(0.02)


class Norm(nnx.Module):
    """Layer norm without a bias."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.scale = nn.param(rngs.params(), (dim,), ("norm",), jax.nn.initializers.ones, jnp.float32, role="norm")

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return jax.nn.standardize(x_BSD) * self.scale[...]


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs):
        shape, axes = (dim, heads, dim // heads), ("embed", "heads", "head_dim")
        self.query = nn.param(rngs.params(), shape, axes, NORMAL, jnp.float32, inputs=1)
        self.key = nn.param(rngs.params(), shape, axes, NORMAL, jnp.float32, inputs=1)
        self.value = nn.param(rngs.params(), shape, axes, NORMAL, jnp.float32, inputs=1)
        self.out = nn.param(rngs.params(), shape, axes, NORMAL, jnp.float32, inputs=1)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        q_BSHK, k_BSHK, v_BSHK = (
            jnp.einsum("BSD,DHK->BSHK", x_BSD, weight[...]) for weight in (self.query, self.key, self.value)
        )
        scores_BHST = jnp.einsum("BSHK,BTHK->BHST", q_BSHK, k_BSHK) / q_BSHK.shape[-1] ** 0.5
        past_ST = jnp.tril(jnp.ones(scores_BHST.shape[-2:], bool))
        shares_BHST = jax.nn.softmax(jnp.where(past_ST, scores_BHST, -jnp.inf))
        return jnp.einsum("BHST,BTHK,DHK->BSD", shares_BHST, v_BSHK, self.out[...])


class Block(nnx.Module):
    """Attention, then an MLP, each on top of the residual stream."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = Norm(dim, rngs), Norm(dim, rngs)
        self.attention = Attention(dim, heads, rngs)
        self.up = nn.param(rngs.params(), (dim, 4 * dim), ("embed", "mlp"), NORMAL, jnp.float32, inputs=1)
        self.down = nn.param(rngs.params(), (4 * dim, dim), ("mlp", "embed"), NORMAL, jnp.float32, inputs=1)

    def __call__(self, x_BSD: jax.Array, ctx: nn.Context) -> tuple[jax.Array, dict]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + jax.nn.gelu(self.mlp_norm(x_BSD) @ self.up[...]) @ self.down[...], {}


class GPT(nnx.Module):
    """Token and position embeddings, blocks, and the token embedding again as the head."""

    def __init__(self, *, n_layers: int, d_model: int, n_heads: int, vocab_size: int, seq_len: int, rngs: nnx.Rngs):
        table = (vocab_size, d_model), ("vocab", "embed"), NORMAL, jnp.float32
        self.tokens = nn.param(rngs.params(), *table, role="embedding")
        places = (seq_len, d_model), ("positions", "embed"), NORMAL, jnp.float32
        self.positions = nn.param(rngs.params(), *places, role="embedding")
        self.blocks = nn.Stack(lambda rngs: Block(d_model, n_heads, rngs), n_layers, rngs=rngs)
        self.norm = Norm(d_model, rngs)

    def embedder(self, batch: nn.Batch, ctx: nn.Context) -> jax.Array:
        one_hot_BSV = jax.nn.one_hot(batch["tokens"], self.tokens.shape[0])  # a lookup that any sharding can do
        return one_hot_BSV @ self.tokens[...] + self.positions[batch["positions"][0]]

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        return jnp.einsum("BSD,VD->BSV", self.norm(x_BSD), self.tokens[...])

    def head(self, x_BSD: jax.Array, batch: nn.Batch, ctx: nn.Context) -> nn.Loss:
        return nn.cross_entropy(self.logits(x_BSD), batch["targets"], batch["loss_mask"])


def main(steps: int = 20) -> list[float]:
    devices = st.select_devices("cpu", emulate=8)
    place = st.Partitioner(st.MeshSpec(pipe=2, fsdp=2, tensor=2).build(devices))
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": 64, "seq_len": 16}
    model = st.ModelDef(lambda rngs: GPT(**sizes, rngs=rngs), schedule=schedules.make("1f1b", 2, 4))
    tx = st.optimizer("adamw", model.weights, lr=1e-2)
    state, step = st.init_state(model, tx, place), st.make_train_step(model, tx, place)
    source, _ = st.open_source("synthetic", seq_len=16, vocab_size=64)
    losses = []
    with st.Loader(source, global_batch=16, seed=0, sharding=place.sharding(("batch", "seq"))) as batches:
        for _ in range(steps):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} on pipe 2, fsdp 2, tensor 2")
    return losses


if __name__ == "__main__":
    main()
