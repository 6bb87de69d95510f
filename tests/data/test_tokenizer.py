"""Tokenizers: any text and back, exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain.data import BPETokenizer, ByteTokenizer, encode_documents
from shardtrain.errors import UserError

TEXT = ["the cat sat on the mat, the cat sat.\n" * 20, "größe ŝanĝo 語 🙂 " * 5]
BPE = BPETokenizer.train(TEXT, 280)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])


@BOTH
@settings(deadline=None)
@given(text=st.text() | st.sampled_from([*TEXT, "a<|endoftext|>b", "\r\n\t\0"]))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert np.all((ids >= 0) & (ids < tokenizer.vocab_size))
    assert tokenizer.separator not in ids


@BOTH
def test_separators_end_documents_and_decode_to_nothing(tokenizer):
    ids = np.concatenate(list(encode_documents(tokenizer, ["ab", "", "c"])))
    assert [len(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.separator) + 1)] == [
        3,
        1,
        2,
        0,
    ]
    assert tokenizer.decode(ids) == "abc"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size, 10**6]) == "a"


def test_byte_ids_are_the_bytes():
    np.testing.assert_array_equal(ByteTokenizer().encode("hé"), [0x68, 0xC3, 0xA9])
    assert ByteTokenizer().decode([0xC3]) == "�"


def test_bpe_merges_what_is_frequent_and_fills_its_vocabulary():
    assert BPE.vocab_size == 280
    assert len(BPE.encode(TEXT[0])) < len(TEXT[0]) / 2
    assert BPETokenizer.train(["ab"], 300).vocab_size == 258, "a text with one pair has one merge"


def test_training_and_saving_are_exact(tmp_path):
    again = BPETokenizer.train(TEXT, 280)
    assert again.fingerprint == BPE.fingerprint
    assert BPETokenizer.train(TEXT, 281).fingerprint != BPE.fingerprint
    (tmp_path / "tokenizer.json").write_text(BPE.to_json(), encoding="utf-8")
    loaded = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == BPE.fingerprint
    np.testing.assert_array_equal(loaded.encode("a<|endoftext|>b"), BPE.encode("a<|endoftext|>b"))


@pytest.mark.parametrize("vocab_size", [0, 256])
def test_vocabulary_too_small_for_all_bytes(vocab_size):
    with pytest.raises(UserError, match=rf"vocab_size = {vocab_size}: a byte-level BPE needs at least 257 ids.* 2048"):
        BPETokenizer.train(TEXT, vocab_size)


def test_a_tokenizer_without_separator():
    import tokenizers

    with pytest.raises(UserError, match=r"no '<\|endoftext\|>', which must end each document; add it"):
        BPETokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
