"""The content of a checkpoint directory, for people to read. Nothing here changes it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardtrain.checkpoint import lifecycle, manifest, reading
from shardtrain.errors import UserError

Status = Literal["verified", "unchecked", "unverified", "corrupt", "uncommitted"]


@dataclass(frozen=True)
class StepRecord:
    """One entry of a checkpoint directory.

    Attributes:
      step: its number.
      status: *verified* (agrees with its manifest), *unchecked* (the same, but only sizes were compared), *unverified*
        (no manifest), *corrupt* or *uncommitted*.
      path: its directory.
      bytes: size of all its files.
      time: last change of the directory, in seconds since the epoch.
      detail: what is wrong with it, if anything.
    """

    step: int
    status: Status
    path: Path
    bytes: int
    time: float
    detail: str = ""


@dataclass(frozen=True)
class Parameter:
    """An array of a checkpoint.

    Attributes:
      path: its dotted name.
      shape: its dims.
      dtype: by name.
      bytes: its size in memory.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def list_steps(directory: Path | str, *, hashes: bool = True) -> list[StepRecord]:
    """List everything in a checkpoint directory, oldest step first, including steps that were set aside.

    Args:
      directory: a run directory or its `checkpoints`.
      hashes: read and hash every file. False compares only sizes, which takes no time but misses flipped bits.

    Raises:
      UserError: there is no such directory.
    """
    return sorted(_records(reading.locate(directory), hashes), key=lambda record: (record.step, record.path.name))


def verify(directory: Path | str, step: int | None = None) -> list[StepRecord]:
    """Hash every file of the steps that a run could restore, or of one step, and return their records.

    Args:
      directory: a run directory or its `checkpoints`.
      step: which step; None means all.

    Raises:
      UserError: there is no such directory or step.
    """
    folder = reading.locate(directory)
    steps = sorted({*lifecycle.committed(folder), *lifecycle.with_manifest(folder)})
    if step is not None and step not in steps:
        raise UserError(f"step {step} does not exist in {folder}; the steps are {steps}")
    return [_step_record(folder, each, hashes=True) for each in steps if step is None or each == step]


def parameter_table(directory: Path | str, step: int) -> list[Parameter]:
    """Return the arrays of a step, sorted by path, from its metadata alone.

    Args:
      directory: a run directory or its `checkpoints`.
      step: which step.

    Raises:
      UserError: no such step, or a corrupt one.
    """
    arrays = reading.describe(directory, step).arrays
    return [Parameter(name, info.shape, info.dtype.name, info.bytes) for name, info in sorted(arrays.items())]


def _records(folder: Path, hashes: bool) -> Iterator[StepRecord]:
    for step in sorted({*lifecycle.committed(folder), *lifecycle.with_manifest(folder)}):
        yield _step_record(folder, step, hashes)
    for path in lifecycle.uncommitted(folder):
        yield _record(path, "uncommitted", "its save did not finish")
    for path in lifecycle.set_aside(folder):
        corrupt = f".{lifecycle.CORRUPT}" in path.name
        yield _record(path, "corrupt" if corrupt else "unverified", f"set aside as {path.name}")


def _step_record(folder: Path, step: int, hashes: bool) -> StepRecord:
    path = folder / str(step)
    if step not in lifecycle.with_manifest(folder):
        return _record(path, "unverified", "it has no manifest")
    problem = manifest.problem(folder, step, hash_up_to=None if hashes else 0)
    if problem is not None:
        return _record(path, "corrupt", problem)
    return _record(path, "verified" if hashes else "unchecked")


def _record(path: Path, status: Status, detail: str = "") -> StepRecord:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    time = path.stat().st_mtime if path.exists() else 0.0
    return StepRecord(int(path.name.split(".")[0]), status, path, size, time, detail)
