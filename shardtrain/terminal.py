"""Words for a reader who may leave (`| head`, a terminal that closes): the run goes on, and still saves."""

import errno
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader; a terminal that hung up


class Steady:
    """A text stream that says the rest to nobody once its reader has gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if anybody listens."""
        self._unless_gone(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody listens."""
        self._unless_gone(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _unless_gone(self, call: Any, *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            # What is in the stream's own buffer is written when Python ends, and would fail then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output if nothing else is given."""
    print(text, file=Steady(stream or sys.stdout), flush=True)  # type: ignore[arg-type]
