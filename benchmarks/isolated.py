"""The measurements of `roofline.py`: each part of a training step by itself, and the limits of the device."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cases import ADAMW, SHAPES, use_checkout
from work import AGAIN

use_checkout()

from programs import random_batch
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision, attend, linear_cross_entropy
from shardtrain.nn.embedding import lookup
from shardtrain.nn.head import chunk_count
from shardtrain.nn.matmul import einsum
from shardtrain.nn.rope import rope_frequencies, rotate
from shardtrain.optim import optimizer
from shardtrain.sharding import Partitioner
from shardtrain.sharding.mesh import MeshSpec
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_train_step


class Bench:
    """One model and batch on the first device, and the clock."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.shape = args, SHAPES[args.size]
        self.precision = Precision(jnp.float32, jnp.dtype(args.compute), jnp.float32)
        self.place = Partitioner(MeshSpec(data=1).build(jax.devices()[:1]))
        self.big = jax.devices()[0].platform == "gpu"
        self.batch = random_batch(self.place, args.batch, args.seq, self.shape.vocab_size)
        self.chunks = chunk_count(args.loss_chunk, (args.batch, args.seq), self.shape.vocab_size)
        self.drawn = 0

    def matmul_rate(self, n: int | None) -> float:
        """FLOP/s of a square matrix product in the compute dtype, on random data."""
        n = n or (8192 if self.big else 2048)
        a, b = self.noise(n, n), self.noise(n, n)
        multiply = jax.jit(lambda a, b: a @ b)
        return 2.0 * n**3 / self.clock(lambda: multiply(a, b))

    def bandwidth(self, n: int | None) -> float:
        """Bytes/s, read and written, of `a + 2 b` in float32."""
        n = n or (2**28 if self.big else 2**25)
        a, b = self.noise(n, dtype=jnp.float32), self.noise(n, dtype=jnp.float32)
        triad = jax.jit(lambda a, b: a + 2 * b)
        return 12.0 * n / self.clock(lambda: triad(a, b))

    def isolated(self) -> dict[str, float]:
        """Seconds that one step's operations of each class take, each class by itself."""
        s, B, S, precision = self.shape, self.args.batch, self.args.seq, self.precision
        D, F, H, G, K = s.d_model, s.d_ff, s.n_heads, s.n_kv_heads, s.head_dim
        x, y, gate, up, a = (self.noise(B, S, dim) for dim in (D, D, F, F, H * K))
        q, k, v = (self.noise(B, S, heads, K) for heads in (H, G, G))
        table, scale = self.noise(s.vocab_size, D, dtype=jnp.float32), jnp.ones(D)
        turns = tuple(rope_frequencies(K, s.rope_theta)[0].tolist())
        operands = ((x, H * K), (x, G * K), (x, G * K), (a, D), (x, F), (x, F), (gate, D))
        weights = [self.noise(left.shape[-1], width, dtype=jnp.float32) for left, width in operands]

        def multiply(batch: Any, weights: Any, lefts: Any) -> Any:
            axes = ("embed", "mlp")
            return [einsum("BSD,DF->BSF", a, w, axes, precision) for a, w in zip(lefts, weights, strict=True)]

        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + s.norm_eps) * scale
            return x.astype(precision.compute)

        def elementwise(batch: Any, x: Any, y: Any, gate: Any, up: Any, q: Any, k: Any, scale: Any) -> Any:
            turned = [rotate(heads, batch["positions"], turns) for heads in (q, k)]
            total = x + y
            return norm(x, scale), norm(total, scale), total + y, turned, jax.nn.silu(gate) * up

        def embed(batch: Any, table: jax.Array) -> jax.Array:
            return lookup(table, batch["tokens"], precision)

        def loss(batch: Any, x: jax.Array, table: jax.Array) -> jax.Array:
            layer: Any = SimpleNamespace(weight=table, axes=("vocab", "embed"), precision=precision)
            labels = batch["targets"], batch["loss_mask"]
            return linear_cross_entropy(x, layer, *labels, chunk=self.args.loss_chunk)[0]

        def attention(batch: Any, *qkv: jax.Array) -> jax.Array:
            return attend(*qkv, implementation=self.args.attention)

        again = AGAIN[self.args.remat]
        lefts = [left for left, _ in operands]
        return {
            "matmul": s.n_layers * self.passes(again[0], multiply, weights, lefts),
            "attention": s.n_layers * self.passes(again[1], attention, q, k, v),
            "norms, elementwise": s.n_layers * self.passes(again[2], elementwise, x, y, gate, up, q, k, scale)
            + self.passes(0, embed, table),
            "loss": self.passes(0, loss, x, table),
            "optimizer": self.optimizer(),
        }

    def passes(self, again: int, f: Callable[..., Any], *args: Any) -> float:
        """Seconds of `f(batch, *args)` forward and backward, and forward `again` times more."""

        @jax.jit
        def both(batch: Any, args: Any, dy: Any) -> Any:
            y, back = jax.vjp(partial(f, batch), *args)
            return y, back(dy)

        batch, forward = self.batch, jax.jit(f)
        dy = jax.tree.map(jnp.ones_like, jax.eval_shape(f, batch, *args))
        seconds = self.clock(lambda: both(batch, args, dy))
        return seconds + (again * self.clock(lambda: forward(batch, *args)) if again else 0.0)

    def optimizer(self) -> float:
        """Seconds of one update of all weights, the gradient's norm included."""
        _, tx, state = self.training()
        grads = jax.tree.map(lambda a: a * 1e-3, state.params)

        def update(params: Any, opt_state: Any, grads: Any) -> Any:
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        step, kept = jax.jit(update, donate_argnums=(0, 1)), [(state.params, state.opt_state)]

        def once() -> Any:
            kept[0] = step(*kept[0], grads)
            return kept[0][0]["norm"]["scale"]

        return self.clock(once)

    def step(self) -> float:
        """Seconds of one whole training step."""
        model, tx, state = self.training()
        step, kept = make_train_step(model, tx, self.place), [state]

        def once() -> Any:
            kept[0], metrics = step(kept[0], self.batch)
            return metrics["loss"]

        return self.clock(once)

    def by_xla(self) -> tuple[float, float]:
        """FLOPs and bytes of the step as XLA counts them before fusion: no remat, all scores and logits at once.

        XLA counts the body of a loop once, and fused kernels not at all. So: one and two layers, unrolled, drawn out.
        """
        counts = []
        for layers in (1, 2):
            model = self.model(n_layers=layers, scan=False, remat="none", attention="einsum", loss_chunk=None)
            tx = optimizer("adamw", model.weights, **ADAMW)
            step = make_train_step(model, tx, self.place)
            costs = step.lower(abstract_state(model, tx, self.place), self.batch).cost_analysis()
            counts.append(np.array([costs["flops"], costs["bytes accessed"]]))
        flops, bytes = counts[0] + (self.shape.n_layers - 1) * (counts[1] - counts[0])
        return float(flops), float(bytes)

    def training(self) -> tuple[ModelDef, Any, Any]:
        model = self.model()
        tx = optimizer("adamw", model.weights, **ADAMW)
        return model, tx, init_state(model, tx, self.place)

    def model(self, **changes: Any) -> ModelDef:
        given = {name: getattr(self.args, name) for name in ("remat", "attention", "loss_chunk")}
        options = {**vars(self.shape), **given, **changes}
        return ModelDef(lambda rngs: Llama(**options, tie_embeddings=True, precision=self.precision, rngs=rngs))

    def noise(self, *dims: int, dtype: Any = None) -> jax.Array:
        self.drawn += 1
        return jax.random.normal(jax.random.key(self.drawn), dims, dtype or self.precision.compute)

    def clock(self, call: Callable[[], Any]) -> float:
        """Median seconds of a call over three rounds, each of as many calls as take `--seconds`."""
        jax.block_until_ready(call())
        n = max(1, math.ceil(self.args.seconds / self._round(call, 1)))
        return statistics.median(self._round(call, n) for _ in range(3))

    def _round(self, call: Callable[[], Any], n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            out = call()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / n
