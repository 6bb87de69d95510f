"""The command line: its verbs, each of which has a file in this folder, and its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import shardtrain
from shardtrain.cli.checkpoint import checkpoint_app
from shardtrain.cli.compare import compare
from shardtrain.cli.config import config
from shardtrain.cli.evaluate import evaluate
from shardtrain.cli.init import init
from shardtrain.cli.report import report
from shardtrain.cli.runs import runs
from shardtrain.cli.sample import sample
from shardtrain.cli.schedule import schedule
from shardtrain.cli.train import train
from shardtrain.cli.watch import watch
from shardtrain.errors import UserError
from shardtrain.host.streams import safe_streams

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(checkpoint_app, name="checkpoint")
VERBS: dict[str, Callable[..., None]] = {
    "init": init,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "runs": runs,
    "watch": watch,
    "compare": compare,
    "config": config,
    "schedule": schedule,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    with safe_streams() as output:
        code = _run()
        sys.stdout.flush()
        # The results of `train` are on the disk. Those of the other commands are their output.
        if not code and output is not None and output.lost is not None and sys.argv[1:2] != ["train"]:
            code = 2
            if not isinstance(output.lost, BrokenPipeError):  # from `| head`
                print(f"error: standard output cannot be written: {output.lost.strerror}", file=sys.stderr)
    sys.exit(code)


def _run() -> int:
    """Run the command; returns its exit code."""
    try:
        sys.path.append(_here())  # `type: my_model:MyModel` finds a file in this directory, as with `python -m`
        app(prog_name="shardtrain")
    except SystemExit as end:  # raised by typer
        if isinstance(end.code, str):  # raised by a user's own code
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except (UserError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        return report(error)
    return 0


def _here() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise UserError(f"the current directory cannot be used: {error.strerror}; cd to one that exists") from error


def _version(asked: bool) -> None:
    if asked:
        print(f"shardtrain {shardtrain.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train neural networks that are too large, or too slow, for one accelerator."""
