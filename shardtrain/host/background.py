"""Work for which a training step must not wait, such as a slow disk or a terminal that nobody reads."""

import threading
from collections.abc import Callable
from queue import Empty, Queue
from types import TracebackType
from typing import Any, Self

from shardtrain.host.closing import close_all

_PAUSE_S = 0.05  # waking up a thread for each call takes longer than most calls


class Background:
    """Calls made in order on a separate thread. Use it in a `with` statement, which waits for all of them.

    Calls are collected, and made every 50 ms, or at once on `flush`. After the first call that fails no more are made.
    Its error is raised by the next `submit` or `flush`, or on leaving the block. (If another error leaves the block, it
    is only logged.)

    Args:
      name: of the thread.
      limit: `submit` waits while this many calls are still to be made.
    """

    def __init__(self, name: str, limit: int = 1024):
        self._calls: Queue[tuple[Callable[..., Any], tuple[Any, ...]]] = Queue(limit)
        self._error: BaseException | None = None
        self._failed = self._closed = False
        self._now = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[..., Any], *args: Any) -> None:
        """Schedule `call(*args)`, after all earlier calls."""
        self._raise()
        if self._calls.full():
            self._now.set()
        self._calls.put((call, args))

    def flush(self) -> None:
        """Wait until all calls are made."""
        self._now.set()
        self._calls.join()
        self._raise()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_all(self.flush, self._end, after=error)

    def _end(self) -> None:
        self._closed = True
        self._now.set()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:  # it is set only once, so nothing is lost between these lines
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        closed = False
        while not closed:
            self._now.wait(_PAUSE_S)
            self._now.clear()
            closed = self._closed  # read before the last calls are made, not after
            self._make_all()

    def _make_all(self) -> None:
        while True:
            try:
                call, args = self._calls.get_nowait()
            except Empty:
                return
            try:
                if not self._failed:  # a line after one that was cut short by a full disk would make the log unreadable
                    call(*args)
            except BaseException as error:
                self._failed, self._error = True, error
            finally:
                self._calls.task_done()
