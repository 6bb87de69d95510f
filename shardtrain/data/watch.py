"""Progress of long work on data, and a way to ask it to stop."""

import sys
import time
from collections.abc import Callable

from shardtrain.errors import UserError

ShouldStop = Callable[[], bool]


class Watch:
    """A callable that long work calls every now and then with its progress.

    Args:
      should_stop: whether the program was asked to stop.
      every_s: seconds before the first line and between lines. Work that takes less prints nothing.
    """

    def __init__(self, should_stop: ShouldStop | None = None, every_s: float = 5.0):
        self._should_stop, self._every_s = should_stop, every_s
        self._due = time.monotonic() + every_s

    def __call__(self, line: str | Callable[[], str]) -> None:
        """Print a line on standard error if one is due.

        Args:
          line: the line, or a function that makes it.

        Raises:
          UserError: the program was asked to stop.
        """
        if self._should_stop is not None and self._should_stop():
            raise UserError("stopped while preparing data; nothing was trained; the same command starts again")
        if time.monotonic() >= self._due:
            print(line if isinstance(line, str) else line(), file=sys.stderr, flush=True)
            self._due = time.monotonic() + self._every_s
