"""Ctrl-C, SIGTERM and SIGHUP as a request to stop, polled by the loop; SIGUSR1 as one to trace the next steps.

The command line uses this, the library never.

A separate thread listens, because Python's own handlers run between two bytecodes of the main thread, and a compilation
or a long step is a single bytecode. So the first signal is acknowledged at once, and a second one ends the process at
once.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from jax.experimental import multihost_utils
from rich.console import Console

from shardtrain.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Saving(Protocol):
    """The run that would be saved: its step, and its checkpointer, if it has one."""

    @property
    def step(self) -> int: ...  # noqa: D102

    @property
    def checkpointer(self) -> Any: ...  # noqa: D102


class Stop:
    """The request to stop, which the loop calls with the number of a step.

    Attributes:
      run: the run that would be saved, once there is one.
      asked: whether this process itself has received a signal.
      trace: traces the next steps, once there are any.
    """

    def __init__(self) -> None:
        self.asked = False
        self.trace: Callable[[], None] | None = None
        self._run: Saving | None = None

    def follow(self, run: Saving) -> None:
        """Tell which run a stop would save, once there is one."""
        self._run = run

    def __call__(self, step: int) -> bool:
        """Whether to stop after this step."""
        return self.asked

    def hear(self, number: int) -> None:
        """Act on any signal, on the listening thread."""
        if number != signal.SIGUSR1:
            self.receive(number)
        elif self.trace is None:
            print("SIGUSR1: there are no steps to trace yet; send it again later", file=sys.stderr, flush=True)
        else:
            self.trace()
            print("SIGUSR1: tracing the next steps", file=sys.stderr, flush=True)

    def receive(self, number: int) -> None:
        """Act on a signal to stop, on the listening thread."""
        name = signal.Signals(number).name
        if not self.asked:
            self.asked = True
            print(f"{name}: {self._plan()}", file=sys.stderr, flush=True)
        elif number != signal.SIGHUP:  # a closing terminal may send several
            print(f"{name} again: stopped at once, losing {self._lost()}", file=sys.stderr, flush=True)
            Console().show_cursor()  # which a live display hides
            os._exit(128 + number)

    def _plan(self) -> str:
        if self._run is None:
            return "stopping while data is prepared, else after the first step; send it again to stop at once"
        return f"saving after this step, then stopping; send it again to stop at once and lose {self._lost()}"

    def _lost(self) -> str:
        if self._run is None or self._run.checkpointer is None:
            return "what was prepared"
        kept = self._run.checkpointer.kept or 0
        return "nothing" if self._run.step == kept else f"the steps since {kept}, up to {self._run.step}"


class StopTogether(Stop):
    """The request to stop one of several processes, on which all agree through JAX's preemption service.

    Every process polls equally often, and all stop at the same poll.

    Args:
      tell: tells the service of a signal.
    """

    def __init__(self, tell: Callable[[], object]) -> None:
        super().__init__()
        self._tell = tell
        self._polls = itertools.count(1)
        self._agreed = False

    def __call__(self, step: int) -> bool:
        """Whether to stop after this step; the same for all processes."""
        if multihost_utils.reached_preemption_sync_point(next(self._polls)):
            self._agreed = True
            if not self.asked:
                print(f"one of the processes is to stop: {self._plan()}", file=sys.stderr, flush=True)
        return self._agreed

    def receive(self, number: int) -> None:
        """Act on a signal, on the listening thread: acknowledge it here, and have all processes agree."""
        super().receive(number)
        self._tell()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Listen in a single process: the first signal asks the loop to save and stop, a second one ends the process."""
    stop = Stop()
    with _listening(stop.hear):
        yield stop


@contextlib.contextmanager
def stop_together() -> Iterator[Stop]:
    """Listen in each of several processes, after `jax.distributed.initialize`: all stop where one gets a signal."""
    with _preemption_service() as tell:
        stop = StopTogether(tell)
        with _listening(stop.hear):
            yield stop


@contextlib.contextmanager
def _preemption_service() -> Iterator[Callable[[], object]]:
    """Take SIGTERM from JAX's preemption service, and yield a function that tells the service of one.

    The service handles SIGTERM in C++, silently. Python cannot read that handler, and would only replace it; so libc
    hands it out, and it is called by hand. It sets a flag, which is safe on any thread.

    Raises:
      UserError: JAX has not started the service.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = libc.signal(signal.SIGTERM, None)
    libc.signal(signal.SIGTERM, handler)  # at once, for a signal that comes now
    if not handler:
        rule = "several processes agree by JAX's preemption service on when to stop"
        raise UserError("JAX_ENABLE_PREEMPTION_SERVICE", "false", rule, "drop this variable, or set it to true")
    tell = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    try:
        yield lambda: tell(signal.SIGTERM)
    finally:
        libc.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _listening(receive: Callable[[int], None]) -> Iterator[None]:
    """Call `receive` with the number of each signal, on a separate thread."""
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    thread = threading.Thread(target=_listen, args=(hears, receive), name="signals", daemon=True)
    # `nohup` makes a process ignore SIGHUP.
    numbers = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    old_pipe = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    old = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
    thread.start()
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_pipe)
        tells.close()  # which ends the thread
        thread.join()
        hears.close()


def _listen(hears: socket.socket, receive: Callable[[int], None]) -> None:
    while numbers := hears.recv(16):
        for number in numbers:
            if number in _SIGNALS:
                receive(number)
