"""The command `shardtrain compare`: runs side by side, as a table and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from shardtrain.cli import complete
from shardtrain.cli.options import Debug
from shardtrain.cli.runs import CELLS, cells
from shardtrain.cli.table import print_table
from shardtrain.errors import UserError


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run directories, or names below runs/.", metavar="RUN RUN ...", autocompletion=complete.run_names
        ),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(help="The picture to draw, a PNG.", show_default="compare.png beside the first run")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare runs: how far they are, how good, how fast, what differs in their configs; and draw their losses."""
    from shardtrain.metrics.find import find_run

    directories = list({(found := find_run(run)).resolve(): found for run in runs}.values())
    if len(directories) < 2:
        raise UserError(f"compare needs two runs, and was given {directories[0]} alone; name another one")
    compare_runs(directories, out or directories[0].parent / "compare.png")


def compare_runs(directories: list[Path], out: Path) -> None:
    """Print the table of some runs, and draw their losses."""
    from shardtrain.metrics.plot import plot_runs
    from shardtrain.metrics.status import RunStatus

    statuses = [RunStatus.of(directory) for directory in directories]
    names = short_names(directories)
    rows = [[fact, *values] for fact, *values in zip(CELLS, *map(cells, statuses), strict=True)]
    settings = _settings(directories)
    rows += [[key, *map(_shown, values)] for key, values in settings.items()]
    print_table(("", *names), rows, numbers=names)
    if not settings:
        print("their configs are the same, but for name and directory")
    labels = [_label(name, settings, column) for column, name in enumerate(names)]
    print(f"drawn into {plot_runs(dict(zip(labels, directories, strict=True)), out)}")


def _label(name: str, settings: dict[str, list[Any]], column: int, most: int = 4) -> str:
    """The name of a run, with the settings in which it differs from the others."""
    shown = [f"{key.rpartition('.')[2]} {_shown(values[column])}" for key, values in list(settings.items())[:most]]
    more = [f"{len(settings) - most} more"] if len(settings) > most else []
    return f"{name}: {', '.join([*shown, *more])}" if shown else name


def _settings(directories: list[Path]) -> dict[str, list[Any]]:
    """The keys in which the configs of runs differ, apart from those that name the run."""
    from shardtrain.config import differences
    from shardtrain.config.files import read_file

    found = differences([read_file(directory / "config.yaml") for directory in directories])
    return {key: values for key, values in found.items() if key not in ("run.name", "run.dir")}


def short_names(directories: list[Path]) -> list[str]:
    """The last parts of some paths, as many as tell them apart."""
    for parts in range(1, 99):
        names = ["/".join(directory.absolute().parts[-parts:]) for directory in directories]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the directories are distinct")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
