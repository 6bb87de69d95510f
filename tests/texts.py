"""Texts continued by a `Sampler`, and in the plainest way."""

import jax.numpy as jnp
import numpy as np
import optax

from helpers import quick
from shardtrain import Sampling, nn
from shardtrain.train.state import init_state

GREEDY = Sampling(temperature=0)
#: Of different lengths, also shorter than the sliding window, and three: rows are added on meshes that split a batch.
PROMPTS = ((5, 9, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (3,))
WINDOW, TOKENS = 24, 12


def state_of(model, place):
    return init_state(model, optax.sgd(0.1), place, seed=3)


def continued(sampler, state, prompts=PROMPTS, tokens=TOKENS, sampling=GREEDY, **options):
    return np.stack([*sampler.stream(state, prompts, tokens=tokens, sampling=sampling, **options)], axis=1)


def read_again(model, state, window=WINDOW):
    """Greedy continuations of `PROMPTS` on one device, each token by the forward pass of all tokens before it."""

    @quick
    def logits(text):
        module = model.merge(state.params, state.model_state)
        batch = {"tokens": text[None], "positions": jnp.arange(window)[None]}
        ctx = nn.Context(batch)
        return module.logits(module.blocks(module.embedder(batch, ctx), ctx)[0])[0]

    found = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(TOKENS):
            known = text[-window:]
            padded = np.zeros(window, np.int32)
            padded[: len(known)] = known
            text.append(int(logits(padded)[len(known) - 1].argmax()))
        found.append(text[len(prompt) :])
    return np.array(found)
