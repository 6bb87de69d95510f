"""Standard output and error that no text and no reader can break."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output(io.FileIO):
    """A file descriptor that may fail: its reader leaves, its disk is full, its terminal closes.

    From then on what is written goes nowhere.

    Attributes:
      lost: the first error.
    """

    lost: OSError | None = None

    def write(self, content: Any, /) -> int:
        """Write, or note that it cannot be done."""
        try:
            return super().write(content) or 0
        except OSError as error:
            self.lost = self.lost or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(content)


@contextlib.contextmanager
def safe_streams() -> Iterator[Output | None]:
    """Within the block `sys.stdout` and `sys.stderr` take any text, and a failing output ends nothing.

    A character that the output's encoding does not have becomes `?`. Gives what became of standard output; `None` where
    that is no file.
    """
    _open_closed()
    saved = sys.stdout, sys.stderr
    output, sys.stdout = _wrapped(sys.stdout)
    _, sys.stderr = _wrapped(sys.stderr)
    try:
        yield output
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = saved


def _open_closed() -> None:
    """Give 0, 1 and 2 something to be where they are closed (`>&-`): else the next file that is opened becomes it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _wrapped(stream: Any) -> tuple[Output | None, Any]:
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError):  # a test's, or a notebook's
        return None, stream
    stream.flush()
    output = Output(descriptor, "w", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
    )
    return output, text
