"""What long work on data says on the way, and how it is asked to stop."""

import sys
import time
from collections.abc import Callable

from shardtrain.errors import UserError

ShouldStop = Callable[[], bool]


class Watch:
    """Told every now and then how far the work is.

    Args:
      should_stop: whether the program was asked to stop.
      every_s: seconds before the first line, and between two: work that takes less says nothing.
    """

    def __init__(self, should_stop: ShouldStop | None = None, every_s: float = 5.0):
        self._should_stop, self._every_s = should_stop, every_s
        self._due = time.monotonic() + every_s

    def __call__(self, line: str | Callable[[], str]) -> None:
        """Prints a line on standard error if it is time to. Raises UserError if the program was asked to stop."""
        if self._should_stop is not None and self._should_stop():
            raise UserError("stopped while preparing data; nothing was trained; the same command starts again")
        if time.monotonic() >= self._due:
            print(line if isinstance(line, str) else line(), file=sys.stderr, flush=True)
            self._due = time.monotonic() + self._every_s
