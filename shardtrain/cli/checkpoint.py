"""The commands `shardtrain checkpoint ...`: the contents of a run's checkpoints, and whether they are intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardtrain.cli.options import Debug
from shardtrain.cli.table import print_table, shape, size
from shardtrain.errors import UserError

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at a run's checkpoints.")

Directory = Annotated[Path, typer.Argument(help="Run directory, such as runs/quickstart.", show_default=False)]
OnlyStep = Annotated[int | None, typer.Option("--step", help="Only this step.")]
NewestStep = Annotated[int | None, typer.Option("--step", help="Default: the newest.")]


@checkpoint_app.command("list")
def checkpoint_list(directory: Directory, debug: Debug = False) -> None:
    """Every step with its status, size and time."""
    import datetime

    from shardtrain.checkpoint import list_steps

    rows = [
        (
            str(record.step),
            record.status,
            size(record.bytes),
            f"{datetime.datetime.fromtimestamp(record.time):%Y-%m-%d %H:%M:%S}",
            record.detail,
        )
        for record in list_steps(directory)
    ]
    if rows:
        print_table(("step", "status", "size", "saved", ""), rows)
    else:
        print(f"{directory} holds no checkpoint yet")


@checkpoint_app.command("verify")
def checkpoint_verify(
    directory: Directory,
    step: OnlyStep = None,
    debug: Debug = False,
) -> None:
    """Hash every file of every step against its manifest; exit code 2 if one does not match."""
    from shardtrain.checkpoint import verify

    records = verify(directory, step)
    if not records:
        raise UserError(f"{directory} holds no checkpoint that a run could restore")
    for record in records:
        print(f"step {record.step}: {record.status}{record.detail and f': {record.detail}'}")
    if any(record.status != "verified" for record in records):
        raise typer.Exit(2)


@checkpoint_app.command("show")
def checkpoint_show(
    directory: Directory,
    step: NewestStep = None,
    debug: Debug = False,
) -> None:
    """Parameters of a step, its data position and mesh, and how its config differs from the run directory's."""
    import difflib

    from shardtrain.checkpoint import list_steps, parameter_table, read_extra
    from shardtrain.config import dump

    sound = [record.step for record in list_steps(directory, hashes=False) if record.status == "unchecked"]
    if step is None and not sound:
        raise UserError(f"no sound checkpoint in {directory}; `shardtrain checkpoint list` shows all that exist")
    step = sound[-1] if step is None else step
    rows = [(row.path, shape(row.shape), row.dtype, f"{row.bytes:,} B") for row in parameter_table(directory, step)]
    print_table((f"step {step}", "shape", "dtype", "size"), rows)
    extra = read_extra(directory, step)
    if "config" not in extra:
        print("no config: this checkpoint was not saved by `shardtrain train`")
        return
    print(f"data position: {extra['data']}")
    print(f"mesh: { {axis: size for axis, size in extra['mesh'].items() if size > 1} }")
    stored = directory / "config.yaml"
    if stored.exists():
        before, now = dump(extra["config"]).splitlines(), stored.read_text(encoding="utf-8").splitlines()
        lines = [*difflib.unified_diff(before, now, "checkpoint", "now", n=0, lineterm="")]
        print("\n".join(["config:", *lines]) if lines else "config: the same as the run directory's")
