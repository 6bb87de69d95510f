"""The command `shardtrain schedule`: pictures and figures of pipeline schedules, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardtrain.cli.options import Debug
from shardtrain.errors import UserError


def schedule(
    name: Annotated[
        str | None,
        typer.Argument(help="Schedule, such as 1f1b, package.module:function, or a CSV file.", show_default=False),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Size of the mesh axis `pipe`.")] = 4,
    microbatches: Annotated[int, typer.Option(help="Microbatches per step.")] = 8,
    chunks: Annotated[int | None, typer.Option(help="Stages on each rank.", show_default="the schedule's own")] = None,
    out: Annotated[Path | None, typer.Option(help="Also draw into this .svg, .png or .pdf.")] = None,
    *,
    compare: Annotated[bool, typer.Option("--compare", help="All schedules side by side.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Also the order as the paper has it.")] = False,
    debug: Debug = False,
) -> None:
    """Draw a pipeline schedule, with its bubble and the activations that it keeps."""
    from rich.console import Console

    from shardtrain.pipeline.schedules import draw, make, published_order, registered

    if name is None and not compare:
        raise UserError(
            f"name a schedule ({', '.join(registered)}, package.module:function, or a .csv file), or say --compare to "
            "see all"
        )
    names = sorted(registered, key=lambda each: registered[each].chunks) if compare else []
    if name is not None and name not in names:
        names.append(name)
    charts = []
    for each in names:
        own = _chunks(each, chunks, compare)
        charts.append(draw.Chart.of(make(each, ranks, microbatches, own)))
        if published and (order := published_order(each, ranks, microbatches, own)) is not None:
            charts.append(draw.Chart.of(order))

    console = Console(highlight=False, soft_wrap=True)
    if compare:
        print(f"{ranks} ranks, {microbatches} microbatches; time: F 1, B 2, I 1, W 1 per rank and microbatch\n")
        console.print(draw.table(charts))
        print(
            "\nin flight: forwards whose backward is not done; memory: the most on any rank, in microbatches through "
            "all of its chunks"
        )
    else:
        for chart in charts:
            console.print(draw.terminal(chart, console.width))
    if out is not None:
        print(f"drawn into {draw.save(draw.picture(charts), out)}")


def _chunks(name: str, asked: int | None, compare: bool) -> int:
    """The number of chunks to draw a schedule with: the one asked for, or its own.

    In a comparison, a schedule keeps its own number if that is 1, or if it does not allow the one asked for.
    """
    from shardtrain.pipeline.schedules import from_csv, get

    own = from_csv(name).chunks if name.endswith(".csv") else get(name).chunks
    if asked is None or not compare:
        return own if asked is None else asked
    if own == 1 or name.endswith(".csv"):
        return own
    try:
        get(name).build(1, 1, asked)
    except UserError:
        return own
    return asked
