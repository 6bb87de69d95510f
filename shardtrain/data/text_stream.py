"""Text from token ids that come one by one, as far as the ids to come cannot change it."""

from __future__ import annotations

from collections.abc import Sequence

from shardtrain.data.tokenizer import Tokenizer

#: U+FFFD, which a tokenizer writes for bytes that are not UTF-8; so also for the first bytes of a character.
_BROKEN = "\ufffd"
#: Ids that are decoded together. The ids before them have no influence on their text, but for the nearest few.
_MOST, _NEAREST = 64, 16


class TextStream:
    """The text of a growing list of ids, in pieces that are final.

    The last bytes of the ids may be the start of a character, and the last characters that of a stop string: these are
    held back until it is known.

    Args:
      tokenizer: of the ids.
      stop: the text ends before the first of these strings that is complete in it, wherever tokens begin and end.

    Attributes:
      stopped: whether one of these has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._given = 0  # characters of their text that were passed on to the search for a stop string
        self._held = ""  # by that search
        self.stopped = False

    def push(self, token: int) -> str:
        """Add an id; return the text that is final by it."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        sure = text.removesuffix(_BROKEN)
        piece, self._given = sure[self._given :], max(self._given, len(sure))
        if len(self._ids) > _MOST and sure == text:
            self._ids = self._ids[-_NEAREST:]
            self._given = len(self._tokenizer.decode(self._ids))
        return self._unstopped(piece)

    def end(self) -> str:
        """Return the rest of the text, with U+FFFD for a character that is not complete."""
        piece = self._unstopped(self._tokenizer.decode(self._ids)[self._given :])
        held, self._held, self._ids, self._given = self._held, "", [], 0
        return piece + held

    def _unstopped(self, piece: str) -> str:
        """The text so far, without what was given already, up to a stop string or what may become one."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        longest = max((_start_of(stop, text) for stop in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _start_of(stop: str, text: str) -> int:
    """The length of the longest start of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
