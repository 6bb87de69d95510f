"""Events for TensorBoard: scalars and texts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from shardtrain.host.files import naming
from shardtrain.metrics.logger import LoggedRun

_FLUSH_S = 1.0  # at most this much of the events is lost by a kill


class Events:
    """A TensorBoard event file, one event per step.

    The `SummaryWriter` of tensorboardX would pass each scalar to a thread through a pipe, which is slower, and loses
    them on a kill.

    Args:
      directory: where the file is made.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        # By itself the name has the time in whole seconds only, and an existing file would be overwritten.
        self._directory = directory
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.time_ns()}")
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text, shown as it is."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # which is code in Markdown
        self._add(Event(wall_time=time.time(), step=step, summary=summary.text(name, indented)))

    def forget_from(self, step: int) -> None:
        """Make TensorBoard forget a step and all later ones."""
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


def open_logger(run: LoggedRun) -> Events:
    """Start a new file of events in the folder `tensorboard` of the run directory."""
    return Events(run.directory / "tensorboard")
