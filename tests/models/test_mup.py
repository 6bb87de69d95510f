"""muP: the learning rate that is best for a narrow Llama is best for a wide one. (Without muP it is not.)"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from shardtrain import UserError, nn
from shardtrain.models.llama import Llama
from shardtrain.optim import optimizer
from shardtrain.train.model_def import ModelDef
from shardtrain.weights.paths import flatten

BASE, HEAD, VOCAB, STEPS = 32, 16, 32, 40
RATES = 2.0 ** np.arange(-10, -2)


def llama(width: int, base: int | None, **options) -> ModelDef:
    sizes = {"n_layers": 2, "d_model": width, "n_heads": width // HEAD, "d_ff": 2 * width, "vocab_size": VOCAB}
    options = {"remat": "none", "attention": "einsum", "loss_chunk": None, **options}
    return ModelDef(lambda rngs: Llama(**sizes, **options, mup_base=base, rngs=rngs))


def chain(steps: int, rows: int = 16, length: int = 16) -> np.ndarray:
    """Text in which each token has four likely successors."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, VOCAB, (VOCAB, 4))
    text = rng.integers(0, VOCAB, (steps, rows, length + 1))
    for t in range(length):
        text[..., t + 1] = successors[text[..., t], rng.integers(0, 4, (steps, rows))]
    return text.astype(np.int32)


def final_losses(width: int, base: int | None) -> np.ndarray:
    """The loss at the end of training for each of `RATES`, all at once."""
    model = llama(width, base)
    tx = optimizer("adamw", model.weights, lr=1.0)  # its update is linear in the rate

    def loss(params, text):
        batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "loss_mask": jnp.ones(text[:, 1:].shape)}
        batch["positions"] = jnp.broadcast_to(jnp.arange(text.shape[1] - 1), batch["tokens"].shape)
        (total, weight, _), _ = nn.forward(model.merge(params, {}), batch, model.context(batch))
        return total / weight

    def step(carry, text, rate):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params, text)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), opt_state), value

    @partial(jax.vmap, in_axes=(0, None))
    def train(rate, text):
        params, _ = model.init(jax.random.key(0))
        return jax.lax.scan(partial(step, rate=rate), (params, tx.init(params)), text)[1][-8:].mean()

    return np.asarray(jax.jit(train)(jnp.asarray(RATES, jnp.float32), chain(STEPS)))


@pytest.mark.full
def test_the_best_learning_rate_stays_as_the_model_widens():
    narrow, wide, plain = (final_losses(*case) for case in ((BASE, BASE), (4 * BASE, BASE), (4 * BASE, None)))
    best = int(narrow.argmin())
    assert wide.argmin() == best
    assert wide.min() < narrow.min()
    assert plain.argmin() < best
    assert plain[best] > plain.min() + 0.05


def test_matrices_learn_more_slowly_and_nothing_else():
    weights = flatten(llama(4 * BASE, BASE).weights)
    assert {w.role for w in weights.values() if w.lr_scale == 0.25} == {"matrix"}
    assert {w.role for w in weights.values() if w.lr_scale == 1} == {"embedding", "norm", "head"}
    assert {w.lr_scale for w in flatten(llama(BASE, BASE).weights).values()} == {1}


def test_the_decay_is_not_scaled():
    model = llama(4 * BASE, BASE)
    params = jax.tree.map(lambda w: jnp.ones(w.shape), model.weights)
    tx = optimizer("adamw", model.weights, lr=0.1, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = jax.tree.map(lambda w: jnp.full(w.shape, 0.0 if w.role == "norm" else -0.05), model.weights)
    assert tiny.relative_error(updates, decayed) < 1e-6


def test_an_optimizer_without_a_known_rule_is_refused():
    with pytest.raises(UserError, match=r"optimizer.type = muon: .*mup_base.* known for adamw and lion"):
        optimizer("muon", llama(4 * BASE, BASE).weights, lr=0.1)
    optimizer("muon", llama(BASE, BASE).weights, lr=0.1)
