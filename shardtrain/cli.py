"""The command line: train and config here, schedule and checkpoint in files of their own."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import shardtrain
from shardtrain.cli_checkpoint import checkpoint_app
from shardtrain.cli_schedule import schedule
from shardtrain.cli_summary import summary
from shardtrain.errors import UserError
from shardtrain.host.streams import safe_streams

if TYPE_CHECKING:
    from shardtrain.config import RunConfig
    from shardtrain.launch.roll_call import RollCall

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(checkpoint_app, name="checkpoint")
app.command()(schedule)

File = Annotated[str, typer.Argument(help="Config file, such as configs/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as mesh.tensor=4.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    with safe_streams() as output:
        code = _run()
        sys.stdout.flush()
        # What `train` made is on the disk. The other commands are what they print.
        if not code and output is not None and output.lost is not None and sys.argv[1:2] != ["train"]:
            code = 2
            if not isinstance(output.lost, BrokenPipeError):  # as `| head` leaves
                print(f"error: standard output cannot be written: {output.lost.strerror}", file=sys.stderr)
    sys.exit(code)


def _run() -> int:
    """Run the command; its exit code."""
    try:
        sys.path.append(_here())  # `type: my_model:MyModel` finds a file beside the user, as under `python -m`
        app()
    except SystemExit as end:  # how typer ends
        if isinstance(end.code, str):  # of a user's own code
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


def report(error: BaseException) -> int:
    """Print an error as its reader needs it; the exit code for it."""
    if "--debug" in sys.argv or not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
        return 1
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:  # a full disk, missing permissions
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; correct that and run the same command again", file=sys.stderr)
    return 2


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


@app.command()
def train(
    file: File,
    overrides: Overrides = None,
    *,
    allow_changes: Annotated[
        bool,
        typer.Option(help="Resume although model, data, optimizer or seed differ from the stored run's."),
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of several processes: where process 0 listens.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes of the run.")] = 1,
    process: Annotated[int, typer.Option(min=0, help="Number of this process.")] = 0,
    join_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="How long processes wait for those that are late.")
    ] = 120,
    debug: Debug = False,
) -> None:
    """Train, or resume where the run directory holds checkpoints. Ctrl-C saves; the same command goes on."""
    gc.set_threshold(100_000)  # imports and tracing make many objects and little garbage: a tenth of a warm start
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if processes == 1 and not process and coordinator is None:
        from shardtrain.config import load_config

        _train(load_config(file, overrides or ()), allow_changes, processes)
    else:
        from shardtrain.launch.processes import join, last_act

        others = join(coordinator, processes, process, join_timeout)  # before a model is imported, which may use JAX
        with last_act(report):
            _train(_same_config(file, overrides or (), others), allow_changes, processes)


def _same_config(file: str, overrides: Sequence[str], others: RollCall) -> RunConfig:
    """The config, once it is read on all processes and is the same."""
    from shardtrain.config import load_config
    from shardtrain.host.alike import asked, together

    with contextlib.closing(others):
        return together(
            lambda: load_config(file, overrides),
            lambda config: asked(config.to_dict(), config.model.load()),
            others.exchange,
        )


def _train(config: RunConfig, allow_changes: bool, processes: int) -> None:
    import jax

    from shardtrain.launch.signals import stop_on_signals, stop_together
    from shardtrain.launch.stuck import explained
    from shardtrain.metrics import progress
    from shardtrain.run import Trainer

    signals = stop_together if processes > 1 else stop_on_signals
    with explained(lambda line: print(line, file=sys.stderr, flush=True)), signals() as stop:
        start = time.perf_counter()
        print("preparing data and state ...", file=sys.stderr, flush=True)
        run = Trainer.from_config(
            config,
            should_stop=stop,
            interrupted=lambda: stop.asked,
            allow_changes=allow_changes,
            processes=processes,
        )
        stop.run = run
        print(f"prepared in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if run.step >= run.steps:
            run.fit()
            left = "its evaluation is still to be made" if run.stopped_early else "nothing to do"
            print(f"the run in {run.directory} is finished: {run.step} of {run.steps} steps; {left}")
        elif jax.process_index() == 0:
            with progress(run.steps, run.step) as run.display:
                for line in summary(run):
                    run.display.message(line)
                run.fit()
            if run.stopped_early:
                print(f"stopped and saved after step {run.step}; to resume:\n  {resume_command()}")
            else:
                print(f"done: {run.step} steps; results in {run.directory}")
                if (sample := run.directory / "sample.txt").exists():
                    print(sample.read_text(encoding="utf-8").rstrip())
        else:
            run.fit()


def resume_command() -> str:
    """This very command, for a shell."""
    program = "python -m shardtrain" if sys.argv[0].endswith("__main__.py") else Path(sys.argv[0]).name
    return f"{program} {shlex.join(sys.argv[1:])}"


@app.command()
def config(file: File, overrides: Overrides = None, *, debug: Debug = False) -> None:
    """Print the resolved config as YAML; fed back, it gives the same result."""
    from shardtrain.config import load_config

    print(load_config(file, overrides or ()).to_yaml(), end="")
