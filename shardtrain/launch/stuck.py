"""A message for a run in which nothing moves. XLA ends such a process with a C++ stack trace, or lets it wait forever.

On CPU devices a running program keeps a core busy. A process that uses no core while its main thread waits for JAX
waits for a collective that some device does not enter.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

_IDLE = 0.2  # share of a core; a progress bar takes a few hundredths
#: A main thread outside of this folder waits for something else: another thread, a disk, a process.
_JAX = Path(jax.__file__).parent


@contextlib.contextmanager
def explained(say: Callable[[str], object], after_s: float = 25.0) -> Iterator[None]:
    """Say so, within the block, if nothing has moved for a while; say it again after twice as long, and so on.

    By default this is a little after XLA's own warning (20 s), and before XLA ends the process (40 s).

    Args:
      say: takes the line, on a separate thread.
      after_s: how long this process must have been idle, in seconds.
    """
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(say, after_s, over), name="stuck", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(say: Callable[[str], object], after_s: float, over: threading.Event) -> None:
    turn = after_s / 10
    since, used = time.monotonic(), _cpu_seconds()
    while not over.wait(turn):
        before, used = used, _cpu_seconds()
        place = _waits_at()
        if used - before > _IDLE * turn or place is None:
            since = time.monotonic()
        elif (idle := time.monotonic() - since) >= after_s:
            say(_explanation(idle, place))
            after_s = 2 * idle


def _cpu_seconds() -> float:
    """Return the processor time of all threads of this process."""
    times = os.times()
    return times.user + times.system


def _waits_at() -> str | None:
    """Return where the main thread waits for CPU devices, as far as can be told; `None` if it does not."""
    config: Any = jax.config
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None or config.jax_platforms != "cpu":  # set by `select_devices`; asking JAX would start it
        return None
    stack = traceback.extract_stack(frame)
    if not Path(stack[-1].filename).is_relative_to(_JAX):
        return None
    ours = next((f for f in reversed(stack) if not Path(f.filename).is_relative_to(_JAX.parent)), stack[-1])
    return f"{ours.filename}:{ours.lineno}, in {ours.name}"


def _explanation(idle: float, place: str) -> str:
    here = f"nothing has moved for {idle:.0f} s"
    if jax.distributed.is_initialized():
        return (
            f"{here}: this process waits for another one, at {place}. That is busy with something else (preparing "
            "data), has stopped, or runs another program: see what it printed last. If none is busy, end them all and "
            "start again: the run resumes"
        )
    return (
        f"{here}: the CPU devices wait for each other in a collective, called at {place}. XLA's CPU backend is known "
        "to do so where its threads are all taken, and ends the process after 40 s; that is no fault of the model. "
        f"Start again with more threads: PJRT_NPROC={_more_threads()}; the run resumes"
    )


def _more_threads() -> int:
    """Return twice the threads that the environment gives XLA now; it may hold anything."""
    now = os.environ.get("PJRT_NPROC", "")
    return 2 * int(now) if now.isdecimal() else 64
