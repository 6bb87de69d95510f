"""A grid of runs: `shardtrain train CONFIG optimizer.lr=1e-4,3e-4 run.seed=0,1`, one after the other."""

from __future__ import annotations

import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import typer

from shardtrain.cli.runs import CELLS, cells
from shardtrain.cli.table import print_table
from shardtrain.errors import UserError

if TYPE_CHECKING:
    from shardtrain.config import RunConfig
    from shardtrain.metrics.status import RunStatus

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class SweptRun(NamedTuple):
    """One run of a sweep.

    Attributes:
      label: the values that are its own, as a name.
      directory: its run directory.
      words: the command line that trains it, without the program.
      config: what these words say.
    """

    label: str
    directory: Path
    words: list[str]
    config: RunConfig

    def status(self) -> RunStatus:
        """How far it is."""
        from shardtrain.metrics.status import RunStatus

        return RunStatus.of(self.directory)

    def is_done(self) -> bool:
        """Whether it is finished, with this config; what a difference means is for `train` to say."""
        from shardtrain.config.files import read_file

        return self.status().state == "finished" and read_file(self.directory / "config.yaml") == self.config.to_dict()


def sweep(file: str, overrides: Sequence[str], options: Sequence[str], write_jobs: Path | None) -> None:
    """Train every run of a grid that is not finished, then print a table of all and draw their losses.

    The same command goes on where it was interrupted. A run that fails does not keep the others from running.

    Args:
      file: the config.
      overrides: some of them with several values.
      options: of `shardtrain train`, for each run.
      write_jobs: write the command lines into this file, one per run, instead of running them.

    Raises:
      UserError: one of the configs has problems, before any of them runs.
    """
    folder, found = swept_runs(file, overrides, options)
    if write_jobs is not None:
        lines = [shlex.join(["shardtrain", *run.words]) for run in found]
        write_jobs.write_text("".join(f"{line}\n" for line in lines))
        print(
            f"{len(found)} jobs in {write_jobs}, one per line; `shardtrain compare {folder}/*` shows them side by side"
        )
        return
    with _Signals() as signals:
        for number, run in enumerate(found, 1):
            if run.is_done():
                continue
            print(f"--- run {number} of {len(found)}: {run.label}", flush=True)
            code = signals.train(run)
            if signals.stopped or (code == 0 and not run.is_done()):
                print("the sweep was stopped; the same command goes on with it")
                return
    _show(folder, found)
    if not all(run.is_done() for run in found):
        raise typer.Exit(1)


def swept_runs(file: str, overrides: Sequence[str], options: Sequence[str] = ()) -> tuple[Path, list[SweptRun]]:
    """The folder of a sweep, beside the run directory of its config, and its runs, whose configs are checked.

    Raises:
      UserError: a config has problems; or two runs would share a directory.
    """
    from shardtrain.config import load_config
    from shardtrain.config.grid import chosen, grid, label

    found, folder = [], Path()
    for choice in grid(overrides):
        own = chosen(overrides, choice)
        folder = Path(f"{load_config(file, own).run.directory}.sweep")
        directory = folder / label(choice)
        own.append(f"run.dir={directory}")
        found.append(SweptRun(label(choice), directory, ["train", file, *own, *options], load_config(file, own)))
    if len({run.directory for run in found}) < len(found):
        raise UserError(f"two runs of this sweep would share a directory in {folder}; name each value once")
    return folder, found


class _Signals:
    """While in use, pass signals on to the run under way, and remember whether one told the sweep to stop."""

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self) for number in _PASSED_ON}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __call__(self, number: int, frame: object) -> None:
        self.stopped |= number != signal.SIGUSR1
        if self._process is not None:
            self._process.send_signal(number)

    def train(self, run: SweptRun) -> int:
        """Train a run in a process of its own; its exit code."""
        # In a group of its own, or a terminal's Ctrl-C would reach it twice, which ends it at once.
        self._process = subprocess.Popen([sys.executable, "-m", "shardtrain", *run.words], process_group=0)
        if self.stopped:  # before there was a process
            self._process.terminate()
        return self._process.wait()


def _show(folder: Path, found: list[SweptRun]) -> None:
    """The runs of a sweep, the best first."""
    from shardtrain.metrics.plot import plot_runs

    ranked = sorted(((run.status(), run) for run in found), key=lambda pair: _loss(pair[0]))
    rows = [(run.label, *cells(status)) for status, run in ranked]
    print_table(("run", *CELLS), rows, numbers=CELLS[:-1])
    started = {run.label: run.directory for status, run in ranked if status.last}
    if started:
        print(f"drawn into {plot_runs(started, folder / 'sweep.png')}")


def _loss(status: RunStatus) -> float:
    loss = status.last.get("eval_loss", status.last.get("loss", math.inf))
    return loss if math.isfinite(loss) else math.inf
