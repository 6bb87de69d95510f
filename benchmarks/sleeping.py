"""A pipeline whose layers sleep, so that emulated devices which share a core still work in parallel.

It is given to the executor without a model: callbacks need a program in which every mesh axis is manual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from shardtrain.nn import Context
from shardtrain.pipeline.executor import pipeline_gradients
from shardtrain.pipeline.layers import layer_table
from shardtrain.pipeline.schedules import Costs, Schedule, allocate
from shardtrain.pipeline.stage import ModelParts, StageFunctions


def costs(backward: str, seconds: float) -> Costs:
    """What the phases of `step` take. Without residuals, the phase after F starts with F again."""
    return Costs(F=seconds, I=seconds + (0.0 if backward == "save" else seconds), W=seconds)


def step(schedule: Schedule, backward: str, seconds: float, devices: list[jax.Device]) -> Callable[[], float]:
    """A compiled step of a model with one layer per stage, which returns the loss.

    F, I and W of one microbatch through all stages of a rank take `seconds` each.
    """
    program = allocate(schedule, save_residuals=backward == "save")
    multiply = slow_product(seconds / schedule.chunks)
    parts = ModelParts(
        embed=lambda shared, batch, ctx: batch["x"],
        block=lambda w, x, ctx: (multiply(w, x), {}),
        head=lambda shared, x, batch, ctx: {"loss": (x.sum(), jnp.float32(x.size))},
        remat=lambda body: body,
    )
    weights = jnp.ones((schedule.chunks, schedule.ranks, 1))
    batch_M = {"x": jnp.ones((1, schedule.microbatches))}

    def gradients(weights: jax.Array, batch_M: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        layers = layer_table(schedule, schedule.stages)
        stage = StageFunctions(parts, weights, {}, Context(batch_M))
        dweights, _, sums = pipeline_gradients(program, layers, stage, batch_M, lambda *gradients: gradients)
        return dweights, sums["loss"][0]

    stages, whole = PartitionSpec(None, "pipe"), PartitionSpec()
    mesh = Mesh(np.array(devices), ("pipe",))
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(stages, whole), out_specs=(stages, whole), check_vma=False)
    compiled = jax.jit(mapped).lower(weights, batch_M).compile()

    def run() -> float:
        return float(jax.block_until_ready(compiled(weights, batch_M))[1])

    return run


def slow_product(seconds: float) -> Any:
    """`(w, x) -> w * x`, whose value and whose gradient by each factor take that long, one after the other."""

    def nap(x: jax.Array) -> jax.Array:
        def sleep(x: Any) -> np.ndarray:
            time.sleep(seconds)
            return np.asarray(x)

        return jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    @jax.custom_vjp
    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return nap(w * x)

    def forward(w: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
        return nap(w * x), (w, x)

    def backward(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, x = kept
        return nap(jnp.einsum("d,d->d", g, x)), nap(g * w)

    product.defvjp(forward, backward)
    return product
