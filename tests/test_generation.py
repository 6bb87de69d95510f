"""Texts continued with a cache are those of the whole text read again for each token, on every mesh."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from helpers import x64  # noqa: F401
from shardtrain import Sampler, Sampling, UserError, generate
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import TrainState
from texts import WINDOW, continued, read_again, state_of

F64 = Precision(*[jnp.float64] * 3)
KINDS = {
    "grouped": {"n_layers": 3},
    "sliding": {"n_layers": 3, "sliding_window": 3, "tie_embeddings": True, "qk_norm": True, "logit_soft_cap": 5.0},
    "scaled": {"n_layers": 5, "rope_scaling": {"type": "linear", "factor": 2.0}, "qkv_bias": True, "scan": False},
}
CASES = [
    ("sliding", {"context": 2, "tensor": 2}, None),
    ("sliding", {"pipe": 2, "fsdp": 2, "tensor": 2}, ("1f1b", 2, 4, 1)),
]
FULL = [
    ("grouped", {}, None),
    ("grouped", {"fsdp": 2, "expert": 2, "tensor": 2}, None),
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


@cache
def wanted(kind, window=WINDOW):
    with jax.enable_x64(True):
        model = llama(kind)
        return read_again(model, state_of(model, tiny.partitioner()), window)


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
    sampler, state = Sampler(model, place, window=16), state_of(model, place)
    got = continued(sampler, state)
    np.testing.assert_array_equal(got, wanted("grouped", window=16))
    programs = sampler._programs
    assert (programs.read._cache_size(), programs.step._cache_size()) == (2, 1)
    text, lengths = np.zeros((1, 16), np.int32), np.ones(1, np.int32)
    _, kept = programs.read(state.params, state.model_state, text, lengths, keep=False)
    assert not kept, "nothing would use it"
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
    _, kept = programs.read(state.params, state.model_state, text, lengths, keep=True)
    for slots, held in ((16, kept), (24, programs.grow(kept, slots=24))):
        for array in jax.tree.leaves(held):
            assert array.shape == (3, 2, slots, 2, 8)
            assert array.sharding.shard_shape(array.shape) == (3, 1, slots // 2, 1, 8)
    continued(sampler, state, [[7, 7], [8]], 20)  # which needs more slots
    assert (programs.read._cache_size(), programs.step._cache_size()) == (1, 2)


@pytest.mark.usefixtures("x64")
def test_other_numbers_of_a_sampling_compile_nothing_again(sampler_and_state):
    sampler, _ = sampler_and_state
    before = sampler._draw._cache_size()
    for temperature, top_p in ((0.0, 0.8), (0.5, 0.8), (1.0, 0.9), (1.5, 1.0)):
        continued(*sampler_and_state, tokens=2, sampling=Sampling(temperature, top_p=top_p, min_p=0.01))
    assert sampler._draw._cache_size() == before + 1


@pytest.mark.usefixtures("x64")
def test_a_text_is_sampled_alike_whatever_is_sampled_with_it(sampler_and_state):
    sample = partial(continued, *sampler_and_state, tokens=6, sampling=Sampling(1.5, top_p=0.9), seed=4)
    together = sample([[7, 7], [8]], numbers=[10, 11])
    np.testing.assert_array_equal(sample([[8]], numbers=[11])[0], together[1])
    assert (sample([[7, 7], [8]], numbers=[20, 21]) != together).any()


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
