"""How much text BPE learns from: all of it, unless its distinct words would take too much memory."""

import itertools
import re
from collections.abc import Callable, Iterable

from shardtrain.data.watch import Watch

DIFFERENT_BYTES = 6_000_000
"""Learning takes about 100 bytes of memory for each byte of the distinct words. English text reaches this limit at
about 20 MB, text without spaces at once."""
_LONG_SPACE = re.compile(r"\s{16,}")


def sample(pieces: Callable[[], Iterable[str]], watch: Watch, limit: int = DIFFERENT_BYTES) -> Iterable[str]:
    """Return every piece of a text, or every second, fourth, eighth, ..., so that its distinct words fit in `limit`.

    Args:
      pieces: gives the text from its start, each time it is called.
      watch: polled at each piece.
      limit: most bytes of distinct words.
    """
    held, size = [], 0
    for piece in pieces():
        held.append(piece)
        size += len(piece.encode())
        watch("reading the text ...")
        if size > limit:
            break
    else:
        return held
    every = 1
    while not _fits(pieces(), every, limit, watch):
        every *= 2
    return itertools.islice(pieces(), 0, None, every)


def _fits(pieces: Iterable[str], every: int, limit: int, watch: Watch) -> bool:
    seen: set[int] = set()
    size = read = 0
    for number, piece in enumerate(pieces):
        read += len(piece)
        watch(f"counted the words of {read / 1e6:.0f} MB")
        if number % every == 0:
            new = [word for word in _rough_words(piece) if hash(word) not in seen]
            seen.update(map(hash, new))
            size += len("".join(new).encode())
            if size > limit:
                return False
    return True


def _rough_words(piece: str) -> set[str]:
    """Return roughly the words into which a piece is cut, long runs of white space included; faster than cutting it."""
    return {*piece.split(), *_LONG_SPACE.findall(piece)}
