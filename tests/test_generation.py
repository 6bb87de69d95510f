"""Texts continued with a cache are those of the whole text read again for each token, on every mesh."""

import logging
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from helpers import quick, x64  # noqa: F401
from shardtrain import Sampler, Sampling, UserError, generate, nn
from shardtrain.models.llama import Llama
from shardtrain.models.mlp import MLP
from shardtrain.nn import Precision
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import TrainState, init_state

F64 = Precision(*[jnp.float64] * 3)
GREEDY = Sampling(temperature=0)
#: Of different lengths, also shorter than the sliding window, and three: rows are added on meshes that split a batch.
PROMPTS = ((5, 9, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (3,))
WINDOW, TOKENS = 24, 12
KINDS = {
    "grouped": {"n_layers": 3},
    "sliding": {"n_layers": 3, "sliding_window": 3, "tie_embeddings": True, "qk_norm": True, "logit_soft_cap": 5.0},
    "scaled": {"n_layers": 5, "rope_scaling": {"type": "linear", "factor": 2.0}, "qkv_bias": True, "scan": False},
}
CASES = [
    ("grouped", {}, None),
    ("sliding", {"context": 2, "tensor": 2}, None),
    ("grouped", {"fsdp": 2, "expert": 2, "tensor": 2}, None),
    ("sliding", {"pipe": 2, "fsdp": 2, "tensor": 2}, ("1f1b", 2, 4, 1)),
]
FULL = [
    ("scaled", {}, None),
    ("sliding", {}, None),
    ("scaled", {"data": 4, "tensor": 2}, None),
    ("grouped", {"fsdp": 8}, None),
    ("scaled", {"context": 4, "fsdp": 2}, None),
    ("grouped", {"island": 2, "data": 2, "tensor": 2}, None),
    ("scaled", {"pipe": 2, "data": 2, "context": 2}, ("zb_v", 2, 4, 2)),
    ("scaled", {"pipe": 2, "expert": 2, "tensor": 2}, ("interleaved", 2, 4, 2)),
    ("grouped", {"pipe": 2, "data": 2}, ("gpipe", 2, 4, 1)),
]


def llama(kind, schedule=None):
    sizes = {**tiny.SIZES, **KINDS[kind]}
    make = lambda rngs: Llama(**sizes, precision=F64, rngs=rngs)  # noqa: E731
    return ModelDef(make, schedule=schedule and schedules.make(*schedule))


def state_of(model, place):
    return init_state(model, optax.sgd(0.1), place, seed=3)


def continued(sampler, state, prompts=PROMPTS, tokens=TOKENS, sampling=GREEDY, **options):
    return np.stack([*sampler.stream(state, prompts, tokens=tokens, sampling=sampling, **options)], axis=1)


def read_again(logits, prompts, tokens, window):
    """Greedy continuations by `logits`, `[window] -> [window, V]` of one text: the plainest way."""
    found = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(tokens):
            known = text[-window:]
            padded = np.zeros(window, np.int32)
            padded[: len(known)] = known
            text.append(int(logits(padded)[len(known) - 1].argmax()))
        found.append(text[len(prompt) :])
    return np.array(found)


@cache
def wanted(kind, tokens=TOKENS, window=WINDOW):
    with jax.enable_x64(True):
        model = llama(kind)
        state = state_of(model, tiny.partitioner())

        @quick
        def logits(text):
            module = model.merge(state.params, state.model_state)
            batch = {"tokens": text[None], "positions": jnp.arange(window)[None]}
            ctx = nn.Context(batch)
            return module.logits(module.blocks(module.embedder(batch, ctx), ctx)[0])[0]

        return read_again(logits, PROMPTS, tokens, window)


@pytest.mark.parametrize(
    ("kind", "mesh", "schedule"),
    [
        pytest.param(*case, id=f"{case[0]} {' '.join(f'{a}{n}' for a, n in case[1].items())}", marks=marks)
        for cases, marks in ((CASES, ()), (FULL, pytest.mark.full))
        for case in cases
    ],
)
@pytest.mark.usefixtures("x64")
def test_texts_of_different_lengths_continue_as_each_would_alone_and_uncached(kind, mesh, schedule):
    place, model = tiny.partitioner(**mesh), llama(kind, schedule)
    sampler = Sampler(model, place, window=WINDOW)
    got = continued(sampler, state_of(model, place))
    assert sampler.uncached is None
    np.testing.assert_array_equal(got, wanted(kind))
    assert len({*got.ravel().tolist()}) > 4


@pytest.mark.usefixtures("x64")
def test_beyond_the_window_a_token_is_predicted_from_the_last_ones():
    place, model = tiny.partitioner(tensor=2), llama("grouped")
    got = continued(Sampler(model, place, window=16), state_of(model, place))
    np.testing.assert_array_equal(got, wanted("grouped", window=16))
    with pytest.raises(AssertionError):  # the prompt of 11 tokens outgrows it
        np.testing.assert_array_equal(got, wanted("grouped"))


@pytest.fixture(scope="module")
def sampler_and_state():
    with jax.enable_x64(True):
        place, model = tiny.partitioner(fsdp=2, context=2, tensor=2), llama("grouped")
        return Sampler(model, place, window=WINDOW), state_of(model, place)


@pytest.mark.usefixtures("x64")
def test_each_program_is_compiled_once_and_the_cache_is_split_like_the_heads(sampler_and_state):
    sampler, state = sampler_and_state
    first, second = (
        continued(sampler, state, prompts, 6, Sampling(1.0, top_k=k), seed=k)
        for k, prompts in ((1, [[7, 7, 7], [8]]), (5, [[9], [1, 2, 3, 4]]))
    )
    assert first.shape == second.shape == (2, 6)
    programs = sampler._programs
    assert (programs.read._cache_size(), programs.step._cache_size()) == (1, 1)
    text, lengths = np.zeros((2, 16), np.int32), np.array([3, 2], np.int32)
    _, kept = programs.read(state.params, state.model_state, text, lengths, slots=16)
    for array in jax.tree.leaves(kept):
        assert array.shape == (3, 2, 16, 2, 8)
        assert array.sharding.shard_shape(array.shape) == (3, 1, 16 // 2, 1, 8)


@pytest.mark.usefixtures("x64")
def test_a_text_is_sampled_alike_whatever_is_sampled_with_it(sampler_and_state):
    sample = partial(continued, *sampler_and_state, tokens=6, sampling=Sampling(1.5, top_p=0.9), seed=4)
    together = sample([[7, 7], [8]], numbers=[10, 11])
    np.testing.assert_array_equal(sample([[8]], numbers=[11])[0], together[1])
    assert (sample([[7, 7], [8]], numbers=[20, 21]) != together).any()


class Mixing(nnx.Module):
    """A block with attention, and with a layer that mixes neighbours and knows of no cache."""

    def __init__(self, rngs):
        self.attention = nn.Attention(32, 4, precision=F64, rngs=rngs)

    def __call__(self, x_BSD, ctx):
        x_BSD = x_BSD + self.attention(x_BSD, ctx)
        return x_BSD + 0.5 * jnp.pad(x_BSD, ((0, 0), (1, 0), (0, 0)))[:, :-1], {}


class Mixer(MLP):
    def __init__(self, *, rngs):
        super().__init__(n_layers=1, d_model=32, d_ff=8, vocab_size=64, precision=F64, rngs=rngs)
        self.blocks = nn.Stack(Mixing, 2, rngs=rngs)


def mlp(rngs):
    return MLP(n_layers=2, d_model=32, d_ff=64, vocab_size=64, precision=F64, rngs=rngs)


@pytest.mark.parametrize(
    ("make", "level", "reason"),
    [
        (
            mlp,
            logging.INFO,
            "MLP samples without a cache, each token by a pass over all tokens before it: its blocks have no nn.Att",
        ),
        (
            Mixer,
            logging.WARNING,
            r"Mixer samples .*: its blocks do not see other tokens by nn.Attention alone \(its logits differ by",
        ),
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_model_without_a_cache_samples_all_the_same_and_says_so_once(make, level, reason, caplog):
    place, model = tiny.partitioner(fsdp=2), ModelDef(lambda rngs: make(rngs=rngs))
    sampler, state = Sampler(model, place, window=WINDOW), state_of(model, place)
    with caplog.at_level(logging.INFO):
        got = continued(sampler, state)
        continued(sampler, state, tokens=1)
    (record,) = [record for record in caplog.records if record.name.startswith("shardtrain")]
    assert record.levelno == level
    assert re.match(reason, record.getMessage())
    module = model.merge(jax.device_get(state.params), {})

    @quick
    def logits(text):
        batch = {"tokens": text[None], "positions": jnp.arange(WINDOW)[None]}
        ctx = nn.Context(batch)
        return module.logits(module.blocks(module.embedder(batch, ctx), ctx)[0])[0]

    np.testing.assert_array_equal(got, read_again(logits, PROMPTS, TOKENS, WINDOW))


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


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "a prompt of at least one token"),
        ([], {}, "a prompt of at least one token"),
        ([[1, 64]], {}, "the prompt = 64: there is no such token; the model's ids are 0 to 63"),
        ([[-1]], {}, "the prompt = -1: there is no such token"),
        ([[1]], {"window": 0}, "window = 0: no token would see another"),
        ([[1]], {"window": 9}, "the window of generation: dim 1 = 9: the rules split 'seq_residual' over tensor 2"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(prompts, options, message):
    place, model = tiny.partitioner(tensor=2), tiny.llama()
    params = jax.tree.map(lambda weight: np.zeros(weight.shape, weight.dtype), model.weights)
    state = TrainState(np.int32(0), params, {}, (), np.int32(0), np.int32(0))
    with pytest.raises(UserError) as error:
        generate(model, state, place, prompts, tokens=1, **{"window": 8, **options})
    assert message in str(error.value)
