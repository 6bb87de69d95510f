"""The progress of training for people to watch: a live display in a terminal, plain lines anywhere else.

Both show the values that they are given and know by name. Absent values (MFU on CPU) are not shown.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_QUIET_S = 30.0  # plain output is never silent for longer than this


class Progress(Protocol):
    """A display. Enter it, `update` it after each step, and leave it.

    A loop shows messages from the thread that trains, and steps from another one.
    """

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a finished `step`, counted from 1, so that the last is the total.

        Known names: loss, eval_loss, grad_norm, lr, tokens_per_s, mfu (a share of 1), memory_bytes, skipped.
        """

    def message(self, text: str) -> None:
        """Print a line that stays, above the display."""

    def __enter__(self) -> Self:
        """Start the display."""

    def __exit__(self, *_: object) -> None:
        """Stop the display, leaving the last numbers in view."""


def progress(
    total: int, start: int, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """Return a display that suits the console, to be used as a context manager.

    Args:
      total: number of steps of the whole run.
      start: number of steps done before, 0 at first.
      console: standard output by default.
      clock: returns seconds.
    """
    console = console or _Console(highlight=False)
    eta = _Eta(total, clock)
    return _Live(total, start, console, eta) if console.is_terminal else _Plain(total, console, eta, clock)


class _Console(Console):
    """Standard output whose reader may leave (`| head`). The run continues, and still saves."""

    def on_broken_pipe(self) -> None:
        """Discard all further output."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Plain:
    """One line for the first step, for the last, for each held-out loss, and at regular intervals."""

    def __init__(self, total: int, console: Console, eta: "_Eta", clock: Callable[[], float]):
        self._total, self._console, self._eta, self._clock = total, console, eta, clock
        self._every = _round(total / 20)
        self._printed: float | None = None

    def update(self, step: int, values: Mapping[str, float]) -> None:
        self._eta.update(step)
        now = self._clock()
        quiet = self._printed is None or now - self._printed >= _QUIET_S
        if quiet or step % self._every == 0 or step >= self._total or "eval_loss" in values:
            self._printed = now
            parts = [
                f"step {step:>{len(str(self._total))}}/{self._total}",
                *_parts(values),
                f"eta {self._eta}",
            ]
            self.message("  ".join(parts))

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Live:
    """A bar with the steps and the remaining time, and the numbers below it."""

    def __init__(self, total: int, start: int, console: Console, eta: "_Eta"):
        self._total, self._eta = total, eta
        self._live = Live(self._draw(start, "compiling the first step ..."), console=console, refresh_per_second=4)
        self._held_out: dict[str, float] = {}

    def update(self, step: int, values: Mapping[str, float]) -> None:
        self._eta.update(step)
        if "eval_loss" in values:
            self._held_out = {"eval_loss": values["eval_loss"]}
        self._live.update(self._draw(step, "  ".join(_parts({**self._held_out, **values}))))

    def message(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _draw(self, step: int, numbers: str) -> Group:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(
            Text(f"step {step}/{self._total}", style="bold"),
            ProgressBar(self._total, step),
            Text(f"eta {self._eta}", style="cyan"),
        )
        return Group(line, Text(numbers))


class _Eta:
    """The remaining time at the mean pace since the end of the first step, so that compilation does not count."""

    def __init__(self, total: int, clock: Callable[[], float]):
        self._total, self._clock = total, clock
        self._first: tuple[int, float] | None = None
        self._left: float | None = None

    def update(self, step: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        elif step > self._first[0]:
            pace = (now - self._first[1]) / (step - self._first[0])
            self._left = pace * (self._total - step)
        if step >= self._total:
            self._left = 0.0

    def __str__(self) -> str:
        return "-" if self._left is None else duration(self._left)


def _parts(values: Mapping[str, float]) -> list[str]:
    formats: dict[str, Callable[[float], str]] = {
        "loss": lambda v: f"loss {v:.4f}",
        "eval_loss": lambda v: f"held-out {v:.4f}",
        "grad_norm": lambda v: f"grad_norm {v:.3g}",
        "lr": lambda v: f"lr {v:.1e}",
        "tokens_per_s": lambda v: f"{si(v)} tok/s",
        "mfu": lambda v: f"MFU {v:.1%}",
        "memory_bytes": _memory,
        "skipped": lambda v: f"skipped {int(v)}",
    }
    return [f(float(values[key])) for key, f in formats.items() if key in values and _worth(key, values[key])]


def _worth(key: str, value: float) -> bool:
    return key != "skipped" or value > 0


def si(value: float) -> str:
    """A number with three digits and a unit of thousands: `6.15k`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # this would round to 1000 of the smaller unit
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _memory(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """A time as `m:ss`, `h:mm:ss` or `Nd hh:mm:ss`, rounded up."""
    minutes, s = divmod(math.ceil(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _round(x: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is not above `x`, at least 1."""
    unit = 10 ** max(0, math.floor(math.log10(max(x, 1))))
    return next(k * unit for k in (5, 2, 1) if k * unit <= max(x, 1))
