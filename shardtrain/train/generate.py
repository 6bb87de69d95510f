"""Tokens from a trained model, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shardtrain.sharding import Partitioner
from shardtrain.train.model_def import ModelDef
from shardtrain.train.next_token import LogitsFunction
from shardtrain.train.sampler import Sampler
from shardtrain.train.sampling import Sampling
from shardtrain.train.state import TrainState


def generate(
    model: ModelDef,
    state: TrainState,
    partitioner: Partitioner,
    prompt: Sequence[int] | Sequence[Sequence[int]],
    *,
    tokens: int,
    window: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    logits: LogitsFunction | None = None,
) -> np.ndarray:
    """Continue one prompt in several samples, one per shard of the batch, or several prompts.

    To see tokens as they come, or to go on without compiling again, use a `Sampler`.

    Args:
      model: as for `Sampler`.
      state: the state of a training run, or the weights of one.
      partitioner: the mesh and its rules.
      prompt: token ids, at least one; or several prompts. Only the last `window` ids are used.
      tokens: how many to generate.
      window: as for `Sampler`.
      temperature: as for `Sampling`, as are the next three.
      top_k: see there.
      top_p: see there.
      min_p: see there.
      seed: of the sampling.
      logits: as for `Sampler`.

    Returns:
      int32 `[samples or prompts, tokens]`, without the prompt.

    Raises:
      UserError: an empty prompt, a model without `logits` or for another mesh, or a state that was donated.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    sampler = Sampler(model, partitioner, window=window, logits=logits)
    several: Any = prompt if len(prompt) and not np.isscalar(prompt[0]) else [prompt] * partitioner.shards("batch")
    found = [*sampler.stream(state, several, tokens=tokens, sampling=sampling, seed=seed)]
    return np.stack(found, axis=1) if found else np.zeros((len(several), 0), np.int32)
