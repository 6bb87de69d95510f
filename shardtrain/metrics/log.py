"""`metrics.jsonl`: one JSON object per step; the same numbers go to TensorBoard, and to other loggers.

Floats are written so that reading them returns the same bits. JSON has no NaN or infinity. They are written as the
strings "NaN", "Infinity" and "-Infinity", as in the JSON mapping of protobuf, and `read` turns them back into floats.
(`null` would not distinguish an overflow from a NaN.)
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from shardtrain.errors import UserError
from shardtrain.host.files import atomic, naming
from shardtrain.metrics.logger import Logger, grouped

FILE = "metrics.jsonl"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """The metrics of one run directory, appended step by step and readable after a `kill -9` at any time.

    Each line is passed to the operating system before `write` returns. TensorBoard's events follow within a second, or
    on `flush`. A last line that a kill left incomplete is dropped on opening. There must be only one writer per
    directory, which the caller's lock ensures.

    Args:
      directory: the run directory.
      tensorboard: whether to write events for TensorBoard as well.
      others: loggers to which everything goes, too.

    Attributes:
      last: the last line; its `step` is -1 if there is none.
    """

    def __init__(self, directory: Path | str, *, tensorboard: bool = True, others: Sequence[Logger] = ()):
        self._path = Path(directory) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self.last, self._file = self._open(None)
        self._loggers = [*others]
        if tensorboard:
            from shardtrain.metrics.loggers.tensorboard import Events  # tensorboardX, which no other use of a log needs

            self._loggers.insert(0, Events(self._path.parent / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, with `step` first.

        Args:
          step: above that of the last line.
          values: Python, NumPy or JAX scalars. Integers stay integers.

        Raises:
          ValueError: `step` is not above that of the last line (see `truncate`), or is also among the values.
        """
        if step <= self.last["step"]:
            raise ValueError(f"step {step} after step {self.last['step']} in {self._path}: truncate({step - 1}) first")
        if "step" in values:
            raise ValueError("'step' is an argument, not one of the values")
        plain = {key: _number(value) for key, value in values.items()}
        line = {"step": step, **plain}
        with naming(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self.last = line
        named = {grouped(key): float(value) for key, value in plain.items()}
        for logger in self._loggers:
            logger.write(step, named)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Pass a text to TensorBoard and the other loggers: the config, a sample."""
        for logger in self._loggers:
            logger.text(name, text, step)

    def truncate(self, step: int) -> None:
        """Drop the lines after `step`. A run that resumes from `step` writes them again.

        The file is replaced completely or not at all, and TensorBoard is told to forget those steps.
        """
        with naming(self._path):
            self._file.close()
        self.last, self._file = self._open(step)
        for logger in self._loggers:
            logger.forget_from(step + 1)

    def flush(self) -> None:
        """Write TensorBoard's events to the disk as well."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Close the files. The log cannot be used afterwards."""
        with naming(self._path):
            self._file.close()
        for logger in self._loggers:
            logger.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, step: int | None) -> tuple[dict[str, Any], TextIO]:
        """Keep only complete lines up to `step` (None: all); return the last one and the file to append to."""
        lines = [(values, line) for values, line in _lines(self._path) if step is None or values["step"] <= step]
        kept = b"".join(line for _, line in lines)
        if kept != self._path.read_bytes():
            with atomic(self._path) as file:
                file.write(kept)
        return (lines[-1][0] if lines else {"step": -1}), self._path.open("a", encoding="utf-8")


def read(directory: Path | str) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl` in a run directory, oldest first, without an incomplete last line.

    Raises:
      UserError: there is no such file, or a line before the last is damaged.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise UserError(f"no {FILE} in {directory}: give the directory of a run that has started")
    return [_parsed(values) for values, _ in _lines(path)]


def tail(directory: Path | str, size: int = 2**16) -> list[dict[str, float]]:
    """Return the last lines of `metrics.jsonl`, oldest first, without reading all of it; none if there is no file.

    Args:
      directory: the run directory.
      size: bytes to read, or more if no line fits; a line that begins before them is left out, and so are damaged ones
        and an incomplete last one.
    """
    try:
        with open(Path(directory) / FILE, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read().split(b"\n")[end > size : -1]
    except FileNotFoundError:
        return []
    if not lines and end > size:
        return tail(directory, 16 * size)
    return [_parsed(found) for line in lines if (found := row(line)) is not None]


def row(line: bytes) -> dict[str, Any] | None:
    """The values of a line as JSON has them, `step` among them; `None` if the line is damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def _parsed(values: dict[str, Any]) -> dict[str, float]:
    return {key: _NOT_FINITE.get(value, value) for key, value in values.items()}


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each complete line, parsed and as bytes."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n") and (found := row(line)) is not None:
            yield found, line
        elif number < len(lines):
            raise UserError(f"{path}, line {number} is damaged: {line[:80]!r}; delete that line and try again")


def _number(value: Any) -> float | int | str:
    if not isinstance(value, float) and np.issubdtype(np.asarray(value).dtype, np.integer):
        return int(value)
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
