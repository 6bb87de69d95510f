"""The command `shardtrain train`, in one process or in several."""

from __future__ import annotations

import contextlib
import gc
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardtrain.cli.dry_run import dry_run
from shardtrain.cli.options import Debug, File, Overrides
from shardtrain.cli.report import report
from shardtrain.cli.summary import summary
from shardtrain.cli.sweep import sweep
from shardtrain.errors import UserError

if TYPE_CHECKING:
    from shardtrain.config import RunConfig
    from shardtrain.launch.roll_call import RollCall
    from shardtrain.run import Trainer


def train(
    file: File,
    overrides: Overrides = None,
    *,
    allow_changes: Annotated[
        bool,
        typer.Option(help="Resume although model, data, optimizer or seed differ from the stored run's."),
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but the steps: checks, shardings, memory, one batch.")
    ] = False,
    write_jobs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of a grid of runs: write their commands, one per line, instead of running."),
    ] = None,
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
    """Train, or resume where the run directory holds checkpoints. Ctrl-C saves; the same command goes on.

    Several values for a key, as in optimizer.lr=1e-4,3e-4, train a grid of runs, one after the other.
    """
    from shardtrain.config.grid import grid

    if len(grid(overrides or ())) > 1:
        if processes > 1 or coordinator is not None or dry:
            raise UserError("a grid of runs is trained by one process; write its jobs by --write-jobs, to start each")
        chosen = {"--allow-changes": allow_changes, "--debug": debug}
        sweep(file, overrides or (), [option for option, given in chosen.items() if given], write_jobs)
        return
    if write_jobs is not None:
        raise UserError("--write-jobs is for a grid of runs; give a key several values: optimizer.lr=1e-4,3e-4")
    gc.set_threshold(100_000)  # imports and tracing make many objects and little garbage: a tenth of a warm start
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run = dry_run if dry else _train
    if processes == 1 and not process and coordinator is None:
        from shardtrain.config import load_config

        run(load_config(file, overrides or ()), allow_changes, processes)
    else:
        from shardtrain.launch.processes import exit_after, join

        others = join(coordinator, processes, process, join_timeout)  # before a model is imported, which may use JAX
        with exit_after(report):
            run(_same_config(file, overrides or (), others), allow_changes, processes)


def _same_config(file: str, overrides: Sequence[str], others: RollCall) -> RunConfig:
    """The config, once all processes have read it and it is the same on each."""
    from shardtrain.config import load_config
    from shardtrain.host.alike import asked, together

    with contextlib.closing(others):
        return together(
            lambda: load_config(file, overrides),
            lambda config: asked(config.to_dict(), config.model.load()),
            others.exchange,
        )


def _train(config: RunConfig, allow_changes: bool, processes: int) -> None:
    """Make the run of a config, train it, and report how it ended."""
    import jax

    from shardtrain.launch.signals import stop_on_signals, stop_together
    from shardtrain.launch.stuck import explained
    from shardtrain.metrics import progress
    from shardtrain.run import Trainer

    signals = stop_together if processes > 1 else stop_on_signals
    with explained(_say), signals() as stop:
        start = time.perf_counter()
        _say("preparing data and state ...")
        run = Trainer.from_config(
            config,
            should_stop=stop,
            interrupted=lambda: stop.asked,
            allow_changes=allow_changes,
            processes=processes,
        )
        stop.follow(run.loop)
        stop.trace = run.profiler.ask
        _say(f"prepared in {time.perf_counter() - start:.1f} s")
        if run.step >= config.run.steps:
            run.fit()
            left = "its evaluation is still to be made" if run.stopped_early else "nothing to do"
            print(f"the run in {run.directory} is finished: {run.step} of {config.run.steps} steps; {left}")
        elif jax.process_index() == 0:
            with progress(config.run.steps, run.step) as display:
                for line in summary(run.job, run.directory, run.resumed_from):
                    display.message(line)
                run.fit(display)
            _report_end(run)
        else:
            run.fit()


def _report_end(run: Trainer) -> None:
    if run.stopped_early:
        print(f"stopped and saved after step {run.step}; to resume:\n  {resume_command()}")
        return
    print(f"done: {run.step} steps; results in {run.directory}")
    if (sample := run.directory / "sample.txt").exists():
        print(sample.read_text(encoding="utf-8").rstrip())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def resume_command() -> str:
    """The present command line, quoted for a shell."""
    program = "python -m shardtrain" if sys.argv[0].endswith("__main__.py") else Path(sys.argv[0]).name
    return f"{program} {shlex.join(sys.argv[1:])}"
