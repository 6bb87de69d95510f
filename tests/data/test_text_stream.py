"""Text that comes token by token is the text of all tokens: no broken characters, no part of a stop string."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain.data import BPETokenizer, ByteTokenizer
from shardtrain.data.text_stream import TextStream

BYTE = ByteTokenizer()
BPE = BPETokenizer.train(["the cat sat on the mat, the cat ate; größer 語 語 " * 20], 300)
#: Characters of one to four bytes, and one of several code points.
SIGNS = st.text(st.sampled_from("abc \né語🙂\u0301"), max_size=40)
CHOICES = {"deadline": None, "max_examples": 200}


def pieces(tokenizer, ids, stop=()):
    stream, found = TextStream(tokenizer, stop), []
    for token in ids:
        found.append(stream.push(int(token)))
        if stream.stopped:
            return found, True
    return [*found, stream.end()], stream.stopped


def until(text, stop):
    """The text before the stop string that is complete first, and whether there is one."""
    found = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    return (text[: min(found)[1]], True) if found else (text, False)


@given(SIGNS, st.sampled_from([BYTE, BPE]))
@settings(**CHOICES)
def test_pieces_are_whole_characters_and_add_up_to_the_text(text, tokenizer):
    found, _ = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(0, 256), max_size=150))
@settings(**CHOICES)
def test_bytes_that_are_no_text_are_those_of_the_tokenizer(ids):
    assert "".join(pieces(BYTE, ids)[0]) == BYTE.decode(ids)


def test_a_character_comes_with_its_last_byte_and_a_stray_one_is_not_held_for_long():
    stream = TextStream(BYTE)
    assert [stream.push(byte) for byte in "🙂a".encode()] == ["", "", "", "🙂", "a"]
    assert [stream.push(byte) for byte in (0xFF, 0xFF, 0x61)] == ["", "\ufffd", "\ufffda"]


def test_a_long_text_is_not_decoded_again_and_again():
    text, longest = "größer 語 " * 200, 0

    class Counting:
        separator, decoded = BYTE.separator, 0

        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return BYTE.decode(ids)

    assert "".join(pieces(Counting(), BYTE.encode(text))[0]) == text
    assert longest < 80


@given(SIGNS, st.lists(st.text("abc é", min_size=1, max_size=4), max_size=3), st.sampled_from([BYTE, BPE]))
@settings(**CHOICES)
def test_a_text_is_cut_exactly_before_the_first_stop_string(text, stop, tokenizer):
    found, stopped = pieces(tokenizer, tokenizer.encode(text), stop)
    assert ("".join(found), stopped) == until(text, stop)


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(BYTE, ["\n\n", "END"])
    assert [stream.push(byte) for byte in b"aEN\nEN"] == ["a", "", "", "EN", "\n", ""]
    assert stream.end() == "EN"
