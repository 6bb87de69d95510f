"""Standard output and error that neither a text nor a reader can break."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output(io.FileIO):
    """A file descriptor that may fail, because its reader leaves, its disk is full, or its terminal closes.

    After that, all further output is discarded.

    Attributes:
      lost: the first error.
    """

    lost: OSError | None = None

    def write(self, content: Any, /) -> int:
        """Write, or note that writing fails."""
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
    """Make `sys.stdout` and `sys.stderr` accept any text within the block, and survive a failing output.

    A character that the encoding of the output lacks becomes `?`.

    Yields:
      The standard output, with its first error; `None` if it is not a file.
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
    """Open 0, 1 and 2 if they are closed (`>&-`). Otherwise the next file to be opened would take their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _wrapped(stream: Any) -> tuple[Output | None, Any]:
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError):  # that of a test or a notebook
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
