"""Text from a trained model, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import UserError
from shardtrain.launch.cpu_collectives import ordered
from shardtrain.sharding import Partitioner, use
from shardtrain.train.jitted_step import refuse_donated
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import TrainState, check_parts


def generate(
    model: ModelDef,
    state: TrainState,
    partitioner: Partitioner,
    prompt: Sequence[int],
    *,
    tokens: int,
    window: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> np.ndarray:
    """Continue a prompt; several samples at once, one per shard of the batch.

    Every token runs the whole window through the model (no key/value cache), under a pipeline as one microbatch, rank
    after rank: good enough for samples, not for serving.

    Args:
      model: a definition whose module follows `nn.Model` and has `logits(x)`.
      state: the state of a training run.
      partitioner: the mesh and its rules.
      prompt: token ids, at least one; only the last `window` of them are used.
      tokens: how many to generate.
      window: context length in tokens, at most that of the training rows.
      temperature: of the sampling; 0 takes the likeliest token.
      seed: of the sampling.

    Returns:
      int32 `[samples, tokens]`, without the prompt.

    Raises:
      UserError: an empty prompt, a model without `logits` or for another mesh, or a state that was donated.
    """
    check_parts(model, partitioner)
    if not prompt:
        raise UserError("generation needs a prompt of at least one token; give sample.prompt some text")
    if not hasattr(outline := model.outline({}), "logits"):
        raise UserError(f"{type(outline).__name__} has no method logits(x), which generation needs; add one")
    refuse_donated(state)
    rows = partitioner.shards("batch")
    step = next_token(model, partitioner, float(temperature))
    known = min(len(prompt), window)
    text = np.zeros((rows, window), np.int32)
    text[:, :known] = list(prompt)[-known:]
    out = np.zeros((rows, tokens), np.int32)
    key = jax.random.key(seed)
    for i in range(tokens):
        chosen = step(state.params, state.model_state, text, known - 1, jax.random.fold_in(key, i))
        out[:, i] = jax.block_until_ready(chosen)  # waits for all devices; reading waits for one only
        if known == window:
            text[:, :-1] = text[:, 1:].copy()
        else:
            known += 1
        text[:, known - 1] = out[:, i]
    return out


def next_token(model: ModelDef, partitioner: Partitioner, temperature: float) -> Any:
    """The jitted function behind `generate`: one more token for every row.

    Returns:
      `(params, model_state, text [B, S] int32, index of the last token, key) -> token ids [B]`.
    """

    @partial(jax.jit, out_shardings=partitioner.sharding(()), compiler_options=ordered(partitioner.devices))
    def step(params: Any, model_state: Any, text_BS: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        with use(partitioner):
            rows, length = text_BS.shape
            batch = {
                "tokens": partitioner.constrain(text_BS, "batch", "seq"),
                "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), text_BS.shape),
                "row": jnp.arange(rows, dtype=jnp.int32),
            }

            def next_BV(module: Any, x_BSD: Any) -> jax.Array:
                logits_BSV = module.logits(x_BSD)
                return jax.lax.dynamic_index_in_dim(logits_BSV, last, axis=1, keepdims=False).astype(jnp.float32)

            logits_BV = model.execution.outputs(params, model_state, batch, partitioner, next_BV)
            if temperature == 0:
                return logits_BV.argmax(-1)
            return jax.random.categorical(key, logits_BV / temperature)

    return step
