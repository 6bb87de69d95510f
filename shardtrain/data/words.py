"""Into which words BPE cuts a text before it merges bytes, and where a long text may be cut in pieces.

The words are those of GPT-2 (Radford et al. 2019): a run of letters, of digits or of other signs, each with the one
space before it, or a run of white space. But none is longer than `LONGEST` characters: a longer run is cut after
every `LONGEST` of them, a space before it not counted. To learn and to apply merges takes time that grows faster than
the longest word, so without a limit a text without spaces is never done. The rule stands in `tokenizer.json`.
"""

import functools
import re
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, pre_tokenizers

LONGEST = 256
PIECE = 1 << 16
"""About so many characters go to the `tokenizers` package at a time: it takes 150 bytes for each, and nothing can
interrupt it."""

_WORD = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}"  # GPT-2 has +
).replace("{1,N}", f"{{1,{LONGEST}}}")
_BEFORE_SPACE = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)


@functools.cache
def words() -> pre_tokenizers.PreTokenizer:
    """What cuts a text into words, and spells them as bytes."""
    split = pre_tokenizers.Split(Regex(_WORD), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def have_our_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer cuts a text into words by `words`."""
    theirs, ours = tokenizer.pre_tokenizer, words()
    return theirs is not None and theirs.__getstate__() == ours.__getstate__()


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """Yields a text that comes in parts as pieces of at most `2 * PIECE` characters, which have the words of the whole.

    So the ids of the pieces are those of the whole.
    """
    rest = ""
    for part in parts:
        for start in range(0, len(part), PIECE):
            rest += part[start : start + PIECE]
            if len(rest) >= PIECE:
                end = _last_end(rest)
                yield rest[:end]
                rest = rest[end:]
    if rest:
        yield rest


def _last_end(text: str) -> int:
    """Where a word of a text ends that may go on."""
    if space := _BEFORE_SPACE.match(text):
        return space.end()  # a word never goes on from what is no space to what is
    # What comes next decides of the last word where it ends, and of the one before if that is an apostrophe: 'll.
    *_, (_, (_, end)), _, _ = words().pre_tokenize_str(text)
    return end
