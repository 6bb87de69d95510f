"""TensorBoard's events."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from shardtrain.host.files import naming

_FLUSH_S = 1.0  # at most this much is lost by a kill


class Events:
    """A TensorBoard event file, one event per step.

    The `SummaryWriter` of tensorboardX would pass each scalar to a thread through a pipe, which is slower, and loses
    them on a kill.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        # By itself the name has the time in whole seconds only, and an existing file would be overwritten.
        self._directory = directory
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.time_ns()}")
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the scalars of a step."""
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def forget_from(self, step: int) -> None:
        """Tell TensorBoard to drop all events from a step on."""
        self._add(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def flush(self) -> None:
        """Write all events to the disk."""
        with naming(self._directory):
            self._writer.flush()  # which also calls fsync: milliseconds, or many of them on a shared disk
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        with naming(self._directory):
            self._writer.close()

    def _add(self, event: Event) -> None:
        with naming(self._directory):
            self._writer.write_event(event)
        if time.monotonic() - self._flushed >= _FLUSH_S:
            self.flush()
