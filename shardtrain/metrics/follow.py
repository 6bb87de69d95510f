"""What happens in a run, as its files tell it: also from another machine that shares the disk."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from shardtrain.metrics.log import FILE, read, row
from shardtrain.metrics.status import RunStatus

_BARS = "▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class Line:
    """A step that was logged.

    Attributes:
      step: its number.
      values: its metrics.
    """

    step: int
    values: dict[str, float]


class Follower:
    """Follows a run; each `poll` returns what is new since the one before.

    Args:
      directory: of the run. It is only read.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._inode, self._offset, self._step = -1, 0, 0
        self._saved, self._aside = self._checkpoints()
        self.status = RunStatus.of(directory)

    def poll(self) -> list[Line | str]:
        """The lines of new steps, and events in words."""
        before, self.status = self.status, RunStatus.of(self._directory)
        return [*self._started(before), *self._lines(), *self._changes()]

    def _started(self, before: RunStatus) -> Iterator[str]:
        holder = self.status.holder
        if holder is not None and holder != before.holder:
            yield f"started by process {holder['pid']} on {holder['host']}"

    def _lines(self) -> Iterator[Line | str]:
        path = self._directory / FILE
        try:
            with open(path, "rb") as file:
                inode = path.stat().st_ino
                if inode != self._inode:  # a run that resumes replaces the file by one without the steps to be repeated
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = [found for line in whole.splitlines() if (found := row(line)) is not None]
        if rows and rows[-1]["step"] < self._step:
            yield f"went back from step {self._step} to {rows[-1]['step']}"
            self._step = rows[-1]["step"]
        for values in rows:
            if values["step"] > self._step:
                self._step = values.pop("step")
                yield Line(self._step, {name: float(value) for name, value in values.items()})

    def _changes(self) -> Iterator[str]:
        saved, aside = self._checkpoints()
        yield from (f"checkpoint {step} is saved" for step in sorted(saved - self._saved))
        yield from (f"a checkpoint was set aside: {name}" for name in sorted(aside - self._aside))
        self._saved, self._aside = saved, aside

    def _checkpoints(self) -> tuple[set[int], set[str]]:
        """Steps with a manifest, and names of those that were set aside."""
        names = [path.name for path in (self._directory / "checkpoints").glob("*")]
        steps = {name.removesuffix(".manifest.json") for name in names if name.endswith(".manifest.json")}
        aside = {name for name in names if ".corrupt" in name or ".unverified" in name}
        return {int(step) for step in steps if step.isdecimal()}, aside


def chart(directory: Path, width: int = 60) -> str:
    """The loss curve as a line of text, such as `7.62 ▇▅▃▂▁ 2.31`; empty before the first finite loss."""
    losses = [row["loss"] for row in read(directory) if math.isfinite(row.get("loss", math.nan))]
    if not losses:
        return ""
    width = min(width, len(losses))
    bounds = [len(losses) * i // width for i in range(width + 1)]
    means = [statistics.fmean(losses[a:b]) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return f"{losses[0]:.4g} {''.join(_BARS[round((mean - low) * scale)] for mean in means)} {losses[-1]:.4g}"
