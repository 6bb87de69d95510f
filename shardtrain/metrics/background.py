"""Work that a training step must not wait for: a slow disk, a terminal that nobody reads."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from shardtrain.closing import close_all


class Background:
    """Calls made on one thread of their own, in order. Use it in a `with` statement, which waits for all of them.

    The first call that fails is the last one made; its error is raised here by the next `submit` or `flush`, or on
    leaving the block. (While another error leaves the block, it is only logged.)

    Args:
      name: of the thread.
      limit: `submit` waits while so many calls are yet to be made.
    """

    def __init__(self, name: str, limit: int = 1024):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._limit, self._failed = limit, False
        self._pending: deque[Future[None]] = deque()

    def submit(self, call: Callable[..., Any], *args: Any) -> None:
        """Have `call(*args)` made after all calls before it."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._limit):
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._make, call, *args))

    def flush(self) -> None:
        """Wait until all calls are made."""
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_all(self.flush, self._executor.shutdown, after=error)

    def _make(self, call: Callable[..., Any], *args: Any) -> None:
        if self._failed:  # a line after one that a full disk cut short would make the log unreadable
            return
        try:
            call(*args)
        except BaseException:
            self._failed = True
            raise
