"""Sources opened by name."""

import re

import numpy as np
import pytest

from shardtrain.data import catalog, open_source, write_tokens
from shardtrain.errors import UserError


def opened(directory, type, **changes):
    arguments = {"seq_len": 8, "vocab_size": 300, "directory": directory} | changes
    return open_source(type, **arguments)


def test_tokens_and_synthetic_have_no_tokenizer(tmp_path):
    write_tokens(tmp_path / "t.bin", [np.arange(33)], vocab_size=40)
    source, tokenizer = opened(None, "tokens", path=tmp_path / "t.bin")
    assert tokenizer is None
    assert (len(source), source.vocab_size) == (4, 40)
    source, tokenizer = opened(None, "synthetic", seed=5)
    assert tokenizer is None
    assert source.vocab_size == 300
    assert source.fingerprint != opened(None, "synthetic", seed=6)[0].fingerprint


def test_a_new_type_is_one_line(monkeypatch, tmp_path):
    source = opened(None, "synthetic")[0]
    monkeypatch.setitem(catalog.FACTORIES, "mine", lambda request: (source, None))
    assert opened(None, "mine")[0] is source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"type": "corpsu"},
            "data.type 'corpsu' does not exist; did you mean corpus?",
        ),
        (
            {"type": "zzz"},
            "data.type 'zzz' does not exist; use one of corpus, text, tokens, synthetic",
        ),
        ({"type": "text"}, "data.path is missing: data.type text reads files; name where they are"),
        ({"type": "tokens"}, "data.path is missing: data.type tokens reads files"),
        ({"type": "tokens", "path": ["a", "b"]}, "data.path ['a', 'b']: data.type tokens reads one file"),
        (
            {"type": "tokens", "path": "a", "tokenizer": "byte"},
            "data.tokenizer 'byte': data.type tokens does not use",
        ),
        (
            {"type": "corpus", "path": "x"},
            "data.path 'x': data.type corpus does not use it; remove it, or choose",
        ),
        ({"type": "synthetic", "path": "x"}, "data.path 'x': data.type synthetic does not use it"),
        (
            {"type": "corpus", "directory": None},
            "directory is missing: data.type corpus keeps its tokens in one",
        ),
        ({"type": "corpus", "tokenizer": "words"}, "data.tokenizer 'words': it must be 'bpe' or 'byte'"),
        (
            {"type": "corpus", "tokenizer": "byte", "tokenizer_vocab": 9},
            "data.vocab_size 9: data.tokenizer byte has exactly 257 ids; remove it, or choose bpe",
        ),
        (
            {"type": "corpus", "vocab_size": 256},
            "tokenizer vocabulary 256: byte-level BPE needs at least 257 ids",
        ),
        (
            {"type": "corpus", "tokenizer_vocab": 100},
            "tokenizer vocabulary 100: byte-level BPE needs at least 257",
        ),
        (
            {"type": "corpus", "tokenizer_vocab": 301},
            "model.vocab_size 300: the data (data.type corpus) has a vocabulary of 301, and each of its ids "
            "needs a row in the embedding; set model.vocab_size to 301 or more",
        ),
        ({"type": "corpus", "tokenizer": "byte", "vocab_size": 256}, "a vocabulary of 257"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, changes, message):
    kept = tmp_path / "data"
    with pytest.raises(UserError, match=re.escape(message)):
        opened(**{"directory": kept, **changes})
    assert not kept.exists(), "found out before any work was done"


def test_token_files_with_a_larger_vocabulary_than_the_model(tmp_path):
    write_tokens(tmp_path / "t.bin", [np.arange(33)], vocab_size=301)
    with pytest.raises(UserError, match=r"model.vocab_size 300: .*type tokens\) has a vocabulary of 301"):
        opened(None, "tokens", path=tmp_path / "t.bin")
