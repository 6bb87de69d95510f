"""The floor: a Llama training step in plain JAX, in one file, as an expert would write it for one mesh.

It uses no part of shardtrain. The library must compute the same, and must not be slower.

Shapes: B batch, S sequence, D model dim, H query heads, G key/value heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 8
    n_kv_heads: int = 8
    d_ff: int = 1024
    vocab_size: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


#: The partition of the rows of a batch.
BATCH = P(("data", "fsdp"))
#: The partition of activations within attention and MLP: by heads or hidden units.
HIDDEN = P(("data", "fsdp"), None, "tensor")
#: The partition of activations between blocks: a tensor-parallel group splits the sequence.
RESIDUAL = P(("data", "fsdp"), "tensor")

#: The partition of each weight on a mesh with axes data, fsdp and tensor.
SPECS = {
    "embedding": P("tensor", "fsdp"),
    "head": P("fsdp", "tensor"),
    "norm": P(),
    "layers": {
        "attention_norm": P(),
        "query": P(None, "fsdp", "tensor"),
        "key": P(None, "fsdp", "tensor"),
        "value": P(None, "fsdp", "tensor"),
        "out": P(None, "tensor", None, "fsdp"),
        "mlp_norm": P(),
        "gate": P(None, "fsdp", "tensor"),
        "up": P(None, "fsdp", "tensor"),
        "down": P(None, "tensor", "fsdp"),
    },
}


def constrain(x: jax.Array, spec: P = BATCH, *, mesh: Mesh | None) -> jax.Array:
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def rope(x_BSHK: jax.Array, positions_BS: jax.Array, theta: float) -> jax.Array:
    K = x_BSHK.shape[-1]
    angle = positions_BS[:, :, None, None] * theta ** (-jnp.arange(0, K, 2, dtype=x_BSHK.dtype) / K)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BSHK, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(sharded: Any, x_BSD: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """Matmuls of one input. In the backward pass a device adds up its shares of the input gradient and sends one
    sum."""
    return tuple(jnp.tensordot(x_BSD, sharded(w, P(None, "tensor")), 1) for w in weights)


def project_bwd(sharded: Any, saved: Any, dys: Any) -> Any:
    x_BSD, weights = saved
    parts, dx_TBSD = sharded.keywords["mesh"].shape["tensor"] if sharded.keywords["mesh"] else 1, 0.0
    for w, dy in zip(weights, dys, strict=True):
        w_DTF = sharded(w, P(None, "tensor")).reshape(w.shape[0], parts, -1)
        dx_TBSD += jnp.einsum("BSTF,DTF->TBSD", dy.reshape(*dy.shape[:2], parts, -1), w_DTF)
    dx_BSD = sharded(dx_TBSD, P("tensor", *BATCH)).sum(0)
    return dx_BSD, *(jnp.tensordot(x_BSD, dy, ((0, 1), (0, 1))) for dy in dys)


project.defvjp(lambda sharded, x, *weights: (project(sharded, x, *weights), (x, weights)), project_bwd)


def block(x_BSD: jax.Array, w: Any, positions_BS: jax.Array, shape: Shape, sharded: Any) -> jax.Array:
    B, S, _ = x_BSD.shape
    G, R, K = shape.n_kv_heads, shape.n_heads // shape.n_kv_heads, shape.head_dim
    h_BSD = sharded(sharded(rms_norm(x_BSD, w["attention_norm"], shape.norm_eps), RESIDUAL))
    q, k, v = (sharded(a, HIDDEN) for a in project(sharded, h_BSD, w["query"], w["key"], w["value"]))
    q, k = rope(q, positions_BS, shape.rope_theta), rope(k, positions_BS, shape.rope_theta)
    q = (q * K**-0.5).reshape(B, S, G, R, K).swapaxes(1, 2).reshape(B, G, S * R, K)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    causal = jnp.repeat(jnp.tril(jnp.ones((S, S), bool)), R, 0)
    scores = jnp.where(causal, jnp.einsum("BGNK,BGTK->BGNT", q, k), -1e30)
    y = jnp.einsum("BGNT,BGTK->BGNK", jax.nn.softmax(scores, -1), v)
    y = sharded(y.reshape(B, G, S, R, K).swapaxes(1, 2).reshape(B, S, G * R, K), HIDDEN)
    x_BSD = x_BSD + sharded(jnp.einsum("BSHK,HKD->BSD", y, w["out"]), RESIDUAL)
    h_BSD = sharded(sharded(rms_norm(x_BSD, w["mlp_norm"], shape.norm_eps), RESIDUAL))
    gate, up = project(sharded, h_BSD, w["gate"], w["up"])
    return x_BSD + sharded(sharded(jax.nn.silu(gate) * up, HIDDEN) @ w["down"], RESIDUAL)


def loss_fn(params: Any, batch: Any, shape: Shape, mesh: Mesh | None = None, *, remat: bool = True) -> jax.Array:
    """Mean next-token cross entropy over the tokens that `loss_mask` weighs."""
    sharded = partial(constrain, mesh=mesh)
    x_BSD = sharded(sharded(sharded(params["embedding"], P("tensor", None))[batch["tokens"]]), RESIDUAL)
    body = partial(block, shape=shape, sharded=sharded)
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    x_BSD, _ = jax.lax.scan(lambda x, w: (body(x, w, batch["positions"]), None), x_BSD, params["layers"])
    logits_BSV = sharded(sharded(rms_norm(x_BSD, params["norm"], shape.norm_eps), RESIDUAL)) @ params["head"]
    logits_BSV = sharded(logits_BSV, P(("data", "fsdp"), None, "tensor"))
    log_z_BS = jax.nn.logsumexp(logits_BSV, -1)
    target_BS = jnp.sum(jnp.where(jnp.arange(shape.vocab_size) == batch["targets"][..., None], logits_BSV, 0), -1)
    return jnp.sum((log_z_BS - target_BS) * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])


def make_step(tx: optax.GradientTransformation, shape: Shape, mesh: Mesh | None = None) -> Any:
    """The jitted `(params, opt_state, batch) -> (params, opt_state, loss, grad_norm)`; parameters and state donated."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, shape, mesh)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(grads)

    return step


def from_library(params: Any) -> Any:
    """The library's parameters of the same model, under the names of this file."""
    layer = params["blocks"]["layer"]
    weights = {name: layer["attention"][name]["weight"] for name in ("query", "key", "value", "out")}
    weights |= {name: layer["mlp"][name]["weight"] for name in ("gate", "up", "down")}
    weights |= {name: layer[name]["scale"] for name in ("attention_norm", "mlp_norm")}
    return {
        "embedding": params["embedding"]["weight"],
        "head": params["unembedding"]["weight"],
        "norm": params["norm"]["scale"],
        "layers": weights,
    }
