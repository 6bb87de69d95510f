"""The command `shardtrain eval`: how good the weights of a run are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from shardtrain.cli.options import Debug, Overrides, Run
from shardtrain.errors import UserError


def evaluate(
    run: Run,
    overrides: Overrides = None,
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Text (a file, a folder, a pattern) or a token file, NAME.bin.",
            show_default="the rows that the run held out",
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Of this checkpoint.", show_default="the newest")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="At most so many rows.", show_default="as in training; all of --data")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Print loss, perplexity, bits per byte and accuracy of a run or a checkpoint, on the devices here."""
    from shardtrain.metrics.find import find_step
    from shardtrain.run.report import report
    from shardtrain.run.trained import Trained

    directory, number = find_step(run)
    if number is not None and step not in (None, number):
        raise UserError(
            "--step", step, f"{run} is already step {number}", f"leave it out, or name the run: {directory}"
        )
    trained = Trained.open(directory.absolute(), number if step is None else step, overrides or ())
    found = report(trained, data, rows)
    if as_json:
        print(json.dumps({"step": trained.step, "rows": found.rows, "targets": found.targets, **found.values}))
        return
    where = "held-out rows" if data is None else f"rows of {data}"
    print(f"{directory}, step {trained.step}: {found.rows:,} {where}, {found.targets:,.0f} targets")
    for name, value in found.values.items():
        shown = f"{value:.2%}" if name == "accuracy" else f"{value:.4f}"
        print(f"{name.replace('_', ' '):<14} {shown:>10}")
