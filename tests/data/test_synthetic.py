"""Synthetic tokens: pure in (seed, row), and learnable down to a known loss."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain.data import SyntheticTokens
from shardtrain.errors import UserError


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), row=st.integers(0, 99), vocab_size=st.integers(4, 500))
def test_a_row_is_a_pure_function_of_seed_and_row(seed, row, vocab_size):
    make = lambda seed: SyntheticTokens(seq_len=40, vocab_size=vocab_size, seed=seed, rows=100)  # noqa: E731
    tokens = make(seed)[row]["tokens"]
    np.testing.assert_array_equal(tokens, make(seed)[row]["tokens"])
    assert tokens.min() >= 0
    assert tokens.max() < vocab_size
    assert not np.array_equal(tokens, make(seed)[(row + 1) % 100]["tokens"])
    assert not np.array_equal(tokens, make(seed + 1)[row]["tokens"])
    assert make(seed).fingerprint != make(seed + 1).fingerprint


def test_the_chain_is_what_it_says():
    """Four successors each, drawn with the stated probabilities, and all tokens equally frequent."""
    source = SyntheticTokens(seq_len=50_000, vocab_size=32, seed=3)
    row = source[0]
    pairs = collections.Counter(zip(row["tokens"].tolist(), row["targets"].tolist(), strict=True))
    unigram = collections.Counter(row["tokens"].tolist())
    successors = collections.Counter(first for first, _ in pairs)
    assert set(successors.values()) == {4}
    conditional = -sum(n * np.log(n / unigram[first]) for (first, _), n in pairs.items()) / source.seq_len
    assert conditional == pytest.approx(source.entropy, rel=0.02)
    assert source.entropy == pytest.approx(0.9142, abs=1e-4)  # -(.7 ln .7 + .15 ln .15 + .1 ln .1 + .05 ln .05)
    frequencies = np.array([unigram[token] for token in range(32)]) / source.seq_len
    assert -np.sum(frequencies * np.log(frequencies)) == pytest.approx(np.log(32), rel=0.01)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("vocab_size", 3, "model.vocab_size 3: synthetic tokens need at least 4"),
        ("seq_len", 0, "data.seq_len 0: synthetic tokens need at least 1"),
        ("seed", -1, "seed -1: synthetic tokens need at least 0"),
        ("rows", 0, "rows 0: synthetic tokens need at least 1"),
    ],
)
def test_sizes_too_small(argument, value, message):
    with pytest.raises(UserError, match=message):
        SyntheticTokens(**{"seq_len": 4, "vocab_size": 8, "seed": 0, argument: value})
