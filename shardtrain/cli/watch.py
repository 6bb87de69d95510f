"""The command `shardtrain watch`: follow a run by its files, also from another machine that shares the disk."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer

from shardtrain.cli.options import Debug, Run


def watch(
    run: Run,
    *,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    debug: Debug = False,
) -> None:
    """Show the loss, throughput and events of a run until it ends. Ctrl-C ends the watching, never the run."""
    from shardtrain.metrics.find import find_run
    from shardtrain.metrics.follow import Follower, Line, chart
    from shardtrain.metrics.progress import progress

    directory = find_run(run)
    follower = Follower(directory)
    first = [each for each in follower.poll() if isinstance(each, Line)]
    status = follower.status
    with progress(status.steps or max(status.step, 1), status.step) as display, contextlib.suppress(KeyboardInterrupt):
        display.message(f"{status.name} in {directory}: {status.state}, step {status.step} of {status.steps}")
        if curve := chart(directory):
            display.message(f"loss {curve}")
        if first:
            display.update(first[-1].step, first[-1].values)
        while follower.status.state in ("running", "silent") and not once:
            time.sleep(every)
            was = follower.status.state
            for each in follower.poll():
                if isinstance(each, Line):
                    display.update(each.step, each.values)
                else:
                    display.message(f"{time.strftime('%H:%M:%S')}  {each}")
            if follower.status.state != was:
                display.message(f"{time.strftime('%H:%M:%S')}  {follower.status.state}")
