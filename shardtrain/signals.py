"""Ctrl-C and SIGTERM as a wish to stop, polled by the loop. The command line's business, never the library's."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from jax.experimental import multihost_utils

ShouldStop = Callable[[int], bool]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[ShouldStop]:
    """Of a single process: the first SIGINT or SIGTERM asks the loop to stop, a second one interrupts at once."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda step: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_together() -> Iterator[ShouldStop]:
    """Of several processes: JAX's preemption service agrees on the step after which all of them stop.

    It listens for SIGTERM in C++ once `jax.distributed.initialize` ran (a Python handler would silence it), so SIGINT
    is passed on as SIGTERM. Every process polls at every step.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    old = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda step: bool(multihost_utils.reached_preemption_sync_point(step))
    finally:
        signal.signal(signal.SIGINT, old)
