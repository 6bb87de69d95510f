"""The words into which BPE cuts a text before it merges bytes, and where a long text may be cut into pieces.

The words are those of GPT-2 (Radford et al. 2019): a run of letters, of digits or of other signs, each with the one
space before it, or a run of white space. But none is longer than `LONGEST` characters, not counting a space before it:
a longer run is cut after every `LONGEST` of them. The time to learn and to apply merges grows faster than the longest
word, so without this limit a text without spaces would never be done. The rule is stored in `tokenizer.json`.
"""

import functools
import re
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, pre_tokenizers

LONGEST = 256
PIECE = 1 << 16
"""About this many characters are passed to the `tokenizers` package at a time. It takes 150 bytes for each, and cannot
be interrupted."""

_WORD = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}"  # GPT-2 has +
).replace("{1,N}", f"{{1,{LONGEST}}}")
_BEFORE_SPACE = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)


@functools.cache
def words() -> pre_tokenizers.PreTokenizer:
    """Return the object that cuts a text into words and spells them as bytes."""
    split = pre_tokenizers.Split(Regex(_WORD), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def have_our_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer cuts a text into words as `words` does."""
    theirs, ours = tokenizer.pre_tokenizer, words()
    return theirs is not None and theirs.__getstate__() == ours.__getstate__()


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """Yield a text that comes in parts as pieces of at most `2 * PIECE` characters, without cutting a word.

    So the ids of the pieces are those of the whole.
    """
    rest = ""
    for part in parts:
        for start in range(0, len(part), PIECE):
            rest += part[start : start + PIECE]
            while len(rest) >= PIECE:
                end = _last_end(rest)
                yield rest[:end]
                rest = rest[end:]
    if rest:
        yield rest


def _last_end(text: str) -> int:
    """Return where a text may be cut: at the end of a word, though the text may continue."""
    if space := _BEFORE_SPACE.match(text):
        return space.end()  # a word never continues from a non-space to a space
    # What follows decides where the last word ends; so it does for the word before, if that is an apostrophe ('ll).
    *ends, _, _ = (end for _, (_, end) in words().pre_tokenize_str(text))
    # White space leaves its last sign to the word that follows, but has none to leave it to at the end of a piece.
    return max(end for end in ends if not _is_space(text[end - 1]) or _is_space(text[end]))


def _is_space(sign: str) -> bool:
    return sign.isspace() and sign not in "\x1c\x1d\x1e\x1f"  # which are no spaces to the `tokenizers` package
