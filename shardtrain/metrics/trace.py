"""Where the time of traced steps went, by class of work, from the profile that JAX writes."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shardtrain.errors import UserError

IDLE, HOST = "idle", "host"


def check_steps(steps: tuple[int, int] | None) -> None:
    """Refuse steps that cannot be traced.

    Raises:
      UserError: the last is before the first, or the first is the first of a run, which starts before any callback.
    """
    if steps is not None and not 2 <= steps[0] <= steps[1]:
        rule = "these are the first and the last step to trace; the first of a run, step 1, cannot be among them"
        raise UserError("profile.steps", list(steps), rule, "write profile.steps=[10,13]")


class Event(NamedTuple):
    """One instruction that ran.

    Attributes:
      thread: where, for the nesting of events.
      name: of the instruction.
      start: in nanoseconds.
      end: in nanoseconds.
    """

    thread: str
    name: str
    start: float
    end: float


def read_events(directory: Path) -> list[Event]:
    """The instructions in the newest profile below a directory that `jax.profiler.start_trace` was given."""
    from jax.profiler import ProfileData

    files = sorted(directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    with warnings.catch_warnings():
        # Of a type that JAX 0.12 makes at the first event; where warnings are errors, its C++ aborts the process.
        warnings.filterwarnings("ignore", "builtin type event_stats", DeprecationWarning)
        return [] if not files else list(_events(ProfileData.from_file(str(files[-1]))))


def _events(data: Any) -> Iterable[Event]:
    for plane in data.planes:
        on_gpu = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue  # the same time again, by module and by source line
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    start = event.start_ns
                    yield Event(f"{plane.name} {line.name}", str(name), start, start + event.duration_ns)


def shares(events: list[Event], classes: Mapping[str, str], devices: int) -> dict[str, float]:
    """Nanoseconds of each class of work on the average device, from the first event to the last; the largest first.

    `host` is the time in which no device does anything, waiting for data or for the next step to be sent; `idle` is the
    rest of the time in which a device has nothing to do, while others have. Together all classes are the whole time.

    Args:
      events: of all devices.
      classes: of each instruction; those that are missing only contain others.
      devices: how many there are.
    """
    if not events:
        return {}
    found: defaultdict[str, float] = defaultdict(float)
    for event, own in _own_times(events):
        if event.name in classes:
            found[classes[event.name]] += own / devices
    whole = max(event.end for event in events) - min(event.start for event in events)
    host = whole - _covered(events)
    rest = {HOST: host, IDLE: max(0.0, whole - host - sum(found.values()))}
    return dict(sorted(found.items(), key=lambda share: -share[1])) | rest


def _own_times(events: list[Event]) -> Iterable[tuple[Event, float]]:
    """Each event, with its time less that of the events within it on the same thread."""
    threads: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    for several in threads.values():
        several.sort(key=lambda event: (event.start, -event.end))
        own = [event.end - event.start for event in several]
        around: list[int] = []
        for number, event in enumerate(several):
            while around and several[around[-1]].end <= event.start:
                around.pop()
            if around:
                own[around[-1]] -= event.end - event.start
            around.append(number)
        yield from zip(several, own, strict=True)


def _covered(events: list[Event]) -> float:
    """The time in which at least one event runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total
