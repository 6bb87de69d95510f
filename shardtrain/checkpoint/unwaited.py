"""The end of a program with a save under way: Python waits for the save and, if it fails, makes the program fail."""

import atexit
import os
import sys
import threading
import traceback
from typing import Protocol

from shardtrain.errors import UserError


class Saver(Protocol):
    """Anything with a save under way."""

    def wait(self) -> None:
        """Wait until it has ended, and raise what went wrong."""


_ADVICE = (
    "The program ended while this was being saved: call Checkpointer.close first, or use the Checkpointer in a `with` "
    "statement"
)
_savers: set[Saver] = set()
_failed = False


def remember(saver: Saver) -> None:
    """Make the end of the program wait for `saver`, which is kept alive until then."""
    _savers.add(saver)


def forget(saver: Saver) -> None:
    """Note that `saver` has been waited for."""
    _savers.discard(saver)


def _wait() -> None:
    global _failed
    for saver in list(_savers):
        try:
            saver.wait()
        except BaseException as error:
            _failed = True
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exception(error)
            print(_ADVICE, file=sys.stderr)


def _fail() -> None:
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a function called by `atexit` has no other way to set the exit code


atexit.register(_fail)
# By the time of `atexit`, thread pools are closed, but Orbax needs one until the end of a save and would fail loudly.
# (It does so in the first releases of Python 3.12, which start no thread once the main one has ended.)
getattr(threading, "_register_atexit", atexit.register)(_wait)
os.register_at_fork(after_in_child=_savers.clear)  # the threads that save are not in the child
