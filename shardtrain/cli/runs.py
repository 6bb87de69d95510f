"""The command `shardtrain runs`: all runs of a folder in a table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardtrain.cli.options import Debug
from shardtrain.cli.table import print_table
from shardtrain.errors import UserError

if TYPE_CHECKING:
    from shardtrain.metrics.status import RunStatus

#: Headings of `cells`.
CELLS = ("step", "loss", "held out", "tokens/s", "last line", "state")


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.", metavar="[DIR]")] = Path("runs"),
    debug: Debug = False,
) -> None:
    """List runs, the last one changed at the end: step, loss, speed, when they last wrote, and their state."""
    from shardtrain.metrics.find import runs_below
    from shardtrain.metrics.status import RunStatus

    found = [RunStatus.of(directory) for directory in runs_below(folder)]
    if not found:
        other = "" if folder == Path("runs") else "; `shardtrain runs` lists those in runs/"
        raise UserError(f"no runs in {folder}/; `shardtrain train CONFIG` makes one in runs/{other}")
    rows = [(str(run.directory), *cells(run)) for run in sorted(found, key=lambda run: run.changed)]
    print_table(("run", *CELLS), rows, numbers=CELLS[:-1])


def cells(run: RunStatus) -> tuple[str, ...]:
    """Step, loss, held-out loss, speed, time and state of a run, for a table."""
    from shardtrain.metrics.progress import duration, si

    steps = "?" if run.steps is None else f"{run.steps:,}"
    return (
        f"{run.step:,}/{steps}",
        *(f"{run.last[key]:.4f}" if key in run.last else "-" for key in ("loss", "eval_loss")),
        "-" if run.tokens_per_s is None else si(run.tokens_per_s),
        f"{duration(max(0.0, time.time() - run.changed))} ago",
        run.state,
    )
