"""Models of one's own are sampled, with a cache where that gives the same logits."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from helpers import x64  # noqa: F401
from shardtrain import Sampler, UserError, generate, nn
from shardtrain.models.mlp import MLP
from shardtrain.nn import Precision
from shardtrain.train.model_def import ModelDef
from texts import WINDOW, continued, read_again, state_of

F64 = Precision(*[jnp.float64] * 3)


class Twice(nnx.Module):
    """A block with two kinds of attention."""

    def __init__(self, rngs):
        self.near = nn.Attention(32, 4, window=3, precision=F64, rngs=rngs)
        self.far = nn.Attention(32, 4, n_kv_heads=1, precision=F64, rngs=rngs)

    def __call__(self, x_BSD, ctx):
        x_BSD = x_BSD + self.near(x_BSD, ctx)
        return x_BSD + self.far(x_BSD, ctx), {}


class Mixing(Twice):
    """It also has a layer that mixes neighbours and knows of no cache."""

    def __call__(self, x_BSD, ctx):
        x_BSD, aux = super().__call__(x_BSD, ctx)
        return x_BSD + 0.5 * jnp.pad(x_BSD, ((0, 0), (1, 0), (0, 0)))[:, :-1], aux


def model_of(block=None):
    """An MLP, or another model with these blocks."""

    def make(rngs):
        model = MLP(n_layers=2, d_model=32, d_ff=64, vocab_size=64, precision=F64, rngs=rngs)
        if block is not None:
            model.blocks = nn.Stack(block, 2, rngs=rngs)
        return model

    return ModelDef(make)


@pytest.mark.parametrize(
    ("block", "level", "reason"),
    [
        (Twice, None, ""),
        (
            None,
            logging.INFO,
            "MLP samples without a cache, each token by a pass over all tokens before it: its blocks keep nothing by",
        ),
        (
            Mixing,
            logging.WARNING,
            r"MLP samples .*: its blocks see other tokens in other ways than .* \(its logits differ by \de",
        ),
    ],
)
@pytest.mark.usefixtures("x64")
def test_any_blocks_continue_a_text_rightly_and_it_is_said_once_if_without_a_cache(block, level, reason, caplog):
    place, model = tiny.partitioner(fsdp=2), model_of(block)
    sampler, state = Sampler(model, place, window=WINDOW), state_of(model, place)
    with caplog.at_level(logging.INFO):
        got = continued(sampler, state)
        continued(sampler, state, tokens=1)
    np.testing.assert_array_equal(got, read_again(model, jax.device_get(state)))
    said = [record for record in caplog.records if record.name.startswith("shardtrain")]
    assert [record.levelno for record in said] == ([] if level is None else [level])
    assert (sampler.uncached is None) == (level is None)
    assert all(re.match(reason, record.getMessage()) for record in said)


@pytest.mark.usefixtures("x64")
def test_a_comparison_that_failed_is_made_again():
    place, model = tiny.partitioner(fsdp=2), model_of(Mixing)
    sampler, state = Sampler(model, place, window=WINDOW), state_of(model, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_apart", no_memory)
        with pytest.raises(MemoryError):
            continued(sampler, state, tokens=1)
    continued(sampler, state, tokens=1)
    assert sampler.uncached is not None


def no_memory(*_):
    raise MemoryError


class Plain(nnx.Module):
    """A module that follows no contract, with statistics that training changes."""

    replicate_unannotated = True

    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.norm(self.embed(tokens)))


def test_any_module_samples_by_a_function_of_its_logits():
    place, model = tiny.partitioner(data=2), ModelDef(Plain)
    state = state_of(model, place)
    found = generate(
        model,
        state,
        place,
        [[1], [2, 3]],
        tokens=4,
        window=8,
        temperature=0,
        logits=lambda module, batch, ctx: module(batch["tokens"]),
    )
    module = model.merge(jax.device_get(state.params), jax.device_get(state.model_state))
    module.eval()
    follows = np.asarray(module(jnp.arange(64)[None])[0].argmax(-1))
    for row, last in zip(found, (1, 3), strict=True):
        for token in row:
            assert token == follows[last]
            last = token
    with pytest.raises(UserError, match=r"Plain has no method logits\(x\).*pass logits, a function"):
        generate(model, state, place, [1], tokens=1, window=8)
