"""Words: those of GPT-2, none too long; and pieces of a text that have the words of the whole."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from shardtrain.data import BPETokenizer, words

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
#: What the rules tell apart: what Python or Unicode take for a space, apostrophes, signs, letters, long characters.
SIGNS = st.sampled_from([*" '\n\r\t.1asrelvLtdm", "'ll", "  ", "\x1c", "\x85", "\xa0", "\u3000", "語", "🙂", "e\u0301"])
RUNS = st.tuples(SIGNS, st.integers(1, 700)).map(lambda run: run[0] * run[1])
TEXTS = st.lists(SIGNS | RUNS, max_size=40).map("".join)
BPE = BPETokenizer.train(["the cat's hat, they'll  see 語語 ....", "    \n\n\n" * 9, "aaaa" * 9], 290)


@settings(deadline=None)
@given(text=st.text(max_size=200) | st.lists(SIGNS, max_size=200).map("".join))
def test_words_are_those_of_gpt2(text):
    assert words.words().pre_tokenize_str(text) == GPT2.pre_tokenize_str(text)


def test_no_word_is_longer_than_the_limit():
    for run in ("x", "7", "=", " ", "語"):
        lengths = [end - start for _, (start, end) in words.words().pre_tokenize_str(f"a {run * 1000} b")]
        assert max(lengths) <= words.LONGEST + 1


@pytest.mark.parametrize("piece", [800, 1100])
@settings(deadline=None, max_examples=60)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 3000), max_size=5))
@example(text="'" + " " * 1501 + "'" * 700 + " ", cuts=[3])  # what is left of a piece is itself as long as one
@example(text="\n" * 400 + "a" * 1000, cuts=[])  # the last of the spaces before a word is a word of its own
def test_pieces_have_the_ids_of_the_whole(piece, text, cuts):
    parts = [text[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "PIECE", piece)
        got = list(words.pieces(parts))
        ids = [np.zeros(0, np.int32), *BPE.encode_parts(parts)]
    assert "".join(got) == "".join(parts)
    assert max(map(len, got), default=0) <= 2 * piece
    np.testing.assert_array_equal(np.concatenate(ids), BPE.encode("".join(parts)))
    assert BPE.decode(np.concatenate(ids)) == "".join(parts)


def test_what_python_calls_a_space_before_a_cut_is_one_for_the_words_too():
    """The cut before white space relies on it: what is `\\S` for Python is in no word with the white space after."""
    for sign in map(chr, range(0x10000)):
        if not sign.isspace() and unicodedata.category(sign) != "Cs":
            ends = [end for _, (_, end) in words.words().pre_tokenize_str(f"{sign} \n")]
            assert ends[0] == 1, repr(sign)


def test_a_space_is_what_the_words_take_for_one():
    for sign in map(chr, range(0x10000)):
        if unicodedata.category(sign) != "Cs":
            pair = words.words().pre_tokenize_str(f"{sign}{sign}7")  # two spaces are two words before a number
            assert words._is_space(sign) == (len(pair) == 3 or sign == " "), repr(sign)


def test_a_tokenizer_of_other_words_gets_the_whole_text(monkeypatch):
    monkeypatch.setattr(words, "PIECE", 800)
    tokenizer = BPETokenizer.train(["a"], 257)
    tokenizer._tokenizer.pre_tokenizer = GPT2  # as runs before this rule have kept it
    old = BPETokenizer(tokenizer._tokenizer)
    text = "word " * 1000
    assert [len(ids) for ids in old.encode_parts([text[:99], text[99:]])] == [len(old.encode(text))]
    assert len(list(BPE.encode_parts([text]))) > 1
