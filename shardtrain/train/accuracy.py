"""How often a language model's likeliest token is the target.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.launch.cpu_collectives import ordered
from shardtrain.nn.model import Batch
from shardtrain.nn.returned import Sums
from shardtrain.sharding import Partitioner, use
from shardtrain.train.evaluation import EvalStep
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import TrainState

#: Positions whose logits are in memory at once.
_POSITIONS = 128


def with_accuracy(eval_step: EvalStep, model: ModelDef, partitioner: Partitioner) -> EvalStep:
    """Add `accuracy`, at the cost of a second forward pass, to what an evaluation step returns.

    Nothing is added where the model has no `logits`, or the batch no `targets` with one label per token.

    Args:
      eval_step: from `make_eval_step`.
      model: the definition of the model.
      partitioner: the mesh and its rules.
    """
    if not hasattr(model.outline({}), "logits"):
        return eval_step

    @partial(jax.jit, out_shardings=partitioner.sharding(()), compiler_options=ordered(partitioner.devices))
    def hits(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with use(partitioner):
            found_BS = model.execution.outputs(state.params, state.model_state, batch, partitioner, _likeliest)
            mask_BS = jnp.where(batch["targets"] < 0, 0, batch["loss_mask"])
            return jnp.where(found_BS == batch["targets"], mask_BS, 0).sum(), mask_BS.sum()

    def step(state: TrainState, batch: Batch) -> Sums:
        sums = eval_step(state, batch)
        if "accuracy" in sums or not _labelled(batch):
            return sums
        return {**sums, "accuracy": hits(state, batch)}

    return step


def _labelled(batch: Batch) -> bool:
    labels = ("tokens", "targets", "loss_mask")
    return all(name in batch and batch[name].shape == batch["tokens"].shape for name in labels)


def _likeliest(module: Any, x_BSD: Any) -> jax.Array:
    """The token with the largest logit at each position, `[B, S]` int32; of equal ones, the first.

    By reductions over the vocabulary alone, so that one that is split over devices stays so.
    """

    def one(x_BCD: Any) -> jax.Array:
        logits_BCV = module.logits(x_BCD)
        ids_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        top_BC1 = logits_BCV.max(-1, keepdims=True)
        return jnp.where(logits_BCV == top_BC1, ids_BCV, logits_BCV.shape[-1]).min(-1)

    if not isinstance(x_BSD, jax.Array) or x_BSD.ndim != 3 or x_BSD.shape[1] % _POSITIONS:
        return one(x_BSD)
    B, S, D = x_BSD.shape
    chunks = S // _POSITIONS
    # Chunk i is the positions i::chunks, so that a split sequence stays where it is.
    found_NBC = jax.lax.map(one, jnp.moveaxis(x_BSD.reshape(B, S // chunks, chunks, D), 2, 0))
    return jnp.moveaxis(found_NBC, 0, 2).reshape(B, S)
