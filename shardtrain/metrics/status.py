"""The state of a run, from the files in its directory alone."""

from __future__ import annotations

import dataclasses
import json
import socket
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from shardtrain.metrics.log import FILE, tail

State = Literal["running", "finished", "stopped", "died", "silent"]

#: A run on another host counts as silent once it has written nothing for so many seconds, and for 20 steps.
_SILENT_S = 600


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    Attributes:
      directory: of the run.
      name: `run.name` of its config.
      steps: those that it shall make; `None` if its config is missing.
      last: the last line of its metrics, with the newest `eval_loss` if that is not much older; empty at first.
      tokens_per_s: the median of the last lines; `None` at first.
      changed: when it last wrote, in seconds since the epoch.
      state: *running*; *finished*; *stopped* before its last step; *died* without a word; or *silent*: on another host,
        where its process cannot be looked for, and for long without a new line.
      holder: the process that writes it, `{pid, host}`; `None` if none does.
    """

    directory: Path
    name: str
    steps: int | None
    last: dict[str, float]
    tokens_per_s: float | None
    changed: float
    state: State
    holder: dict[str, Any] | None

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        return int(self.last.get("step", 0))

    @classmethod
    def of(cls, directory: Path) -> RunStatus:
        """Read the state of a run, which may be running."""
        section = _run_section(directory)
        lines = tail(directory)
        speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
        last = dict(lines[-1]) if lines else {}
        held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
        if held_out:
            last["eval_loss"] = held_out[-1]
        steps, holder = section.get("steps"), read_holder(directory)
        changed = max((p.stat().st_mtime for p in (directory / FILE, directory / "lock") if p.exists()), default=0.0)
        done = steps is not None and last.get("step", 0) >= steps
        return cls(
            directory=directory,
            name=section.get("name", directory.name),
            steps=steps,
            last=last,
            tokens_per_s=statistics.median(speeds) if speeds else None,
            changed=changed,
            state=_state(directory, holder, done, changed, last.get("step_time_s", 0.0)),
            holder=holder,
        )


def read_holder(directory: Path) -> dict[str, Any] | None:
    """The process that has the lock of a run, `{pid, host}`; `None` if it was released."""
    try:
        holder = json.loads((directory / "lock").read_text())
        return holder if holder.keys() >= {"pid", "host"} else None
    except (OSError, ValueError, AttributeError):  # there is none, or its process has not written its name yet
        return None


def _state(directory: Path, holder: dict[str, Any] | None, done: bool, changed: float, step_s: float) -> State:
    if holder is None:
        return "finished" if done else "stopped"
    if holder["host"] != socket.gethostname():
        return "running" if time.time() - changed < max(_SILENT_S, 20 * step_s) else "silent"
    return "running" if _lives(holder["pid"], (directory / "lock").stat().st_mtime) else "died"


def _lives(pid: int, since: float) -> bool:
    """Whether a process exists that began before a time; later ones only have its number."""
    try:
        return psutil.Process(pid).create_time() <= since + 1
    except psutil.Error:
        return False


def _run_section(directory: Path) -> dict[str, Any]:
    """What a stored config says of `run`; nothing if it cannot be read."""
    try:
        section = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return section if isinstance(section, dict) else {}
