"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from shardtrain.cli import complete

File = Annotated[
    str,
    typer.Argument(
        help="Config file, such as configs/quickstart.yaml.", show_default=False, autocompletion=complete.config_files
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides, such as mesh.tensor=4.",
        show_default=False,
        autocompletion=complete.overrides,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Run = Annotated[
    str,
    typer.Argument(
        help="Run directory, or the name of a run below runs/.",
        metavar="RUN",
        show_default=False,
        autocompletion=complete.run_names,
    ),
]
